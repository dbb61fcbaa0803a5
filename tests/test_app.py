"""What answers behind the page of ``pop-mm app``, and its server."""

import gc
import io
import os
import re
import socket
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from html import unescape
from importlib.util import find_spec

import pytest
from PIL import Image

from helpers.app_model import QUESTION, SCENE, alone, changes, free_port, idle, tiny_asker
from helpers.observe import fingerprint
from helpers.tiny_folder import save
from pop_mm import PopConfig, prune
from pop_mm.app import Answer, Asker, Progress, Turn
from pop_mm.app.examples import examples
from pop_mm.app.line import Line
from pop_mm.app.server import serve
from pop_mm.app.words import panels, part, result
from pop_mm.cli import main
from pop_mm.errors import PopError

EARLY = "gradio" in sys.modules
SETTINGS = dict(ratio=0.4, max_new_tokens=12)
LONG = {**SETTINGS, "max_new_tokens": 256}

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio (the extra [app]) is not installed")


@pytest.fixture(scope="module")
def asker(tmp_path_factory):
    return tiny_asker(tmp_path_factory.mktemp("app") / "tiny-qwen")


@pytest.fixture(autouse=True)
def _unchanged(asker):
    """Fail any test that does not leave the model bit for bit what it was, once nobody is being answered."""
    before = fingerprint(asker.model)
    yield
    idle(asker)
    assert changes(asker, before) == []


# what answers ---------------------------------------------------------------------------------------------------------


def test_the_dense_answer_streams_and_then_the_pruned_one(asker):
    steps = list(asker.ask(SCENE, QUESTION, **SETTINGS))
    counts = [(step.dense.tokens, step.pruned.tokens) for step in steps]
    both = [(n, 0) for n in range(1, 13)] + [(12, 0)] + [(12, n) for n in range(1, 13)] + [(12, 12)] * 2
    assert counts == both, "a step for every token, and one for each answer that is complete and the report"
    last = steps[-1]
    assert (last.dense.text, last.pruned.text) == alone(asker)
    assert last.dense.done and last.pruned.done and last.report.modality_tokens["image"] > 0
    assert last.speedup == last.pruned.tokens_per_s / last.dense.tokens_per_s
    assert all(step.report is None and step.pruned.text == "" for step in steps[:13])


def test_the_answers_say_where_they_part(asker):
    progress = Progress(Answer("a b c", (1, 2, 3)), Answer("a d c", (1, 4, 3)))
    assert progress.same_tokens == 1
    assert replace(progress, pruned=progress.dense).same_tokens is None
    assert replace(progress, pruned=Answer("a b", (1, 2))).same_tokens == 2
    assert part("one <b>two three", "one <b>tea three") == (
        "one <mark>&lt;b&gt;two</mark> three",
        "one <mark>&lt;b&gt;tea</mark> three",
    )
    assert part("one two", "one") == ("<mark>one</mark> two", "<mark>one</mark>")
    assert part("same", "same ") == ("<mark>same</mark>", "<mark>same</mark> ")
    (*_, last) = asker.ask(SCENE, QUESTION, **SETTINGS)
    dense, pruned = panels(last, PopConfig(0.4), 12)
    assert dense.count("<mark>") == pruned.count("<mark>") == 1
    assert asker.advice(dict(ratio=0.9)) is None, "nothing was measured on models as small as this one"
    assert "a &lt;bad&gt; ratio" in result(last, advice="a <bad> ratio").split("<details>")[0]


def test_the_examples_are_answered_alike_by_default():
    asker = Asker.load("tiny-vlm")
    for picture, question in examples(True):
        (*_, last) = asker.ask(picture, question, max_new_tokens=64)
        assert last.dense.text == last.pruned.text and last.report.config.budget == 0.65


def test_a_stopped_question_ends_without_a_report(asker):
    stop = threading.Event()
    for step in asker.ask(SCENE, QUESTION, stop=stop, **LONG):
        if step.pruned.tokens == 3:
            stop.set()
    assert step.report is None and 3 <= step.pruned.tokens < 256


def test_who_waits_is_told_how_many_come_first(asker):
    first = asker.ask(SCENE, QUESTION, **LONG)
    next(first)
    stop = threading.Event()
    gives_up, patient = (
        asker.ask(SCENE, "Where is it?", stop=stop, **SETTINGS),
        asker.ask(SCENE, "How many?", **SETTINGS),
    )
    assert next(gives_up).waiting == 1
    assert next(patient).waiting == 2
    stop.set()
    assert list(gives_up) == [], "it is not answered"
    assert next(patient).waiting == 1, "and the others move up"
    first.close()
    (*_, last) = patient
    assert last.waiting == 0 and (last.dense.text, last.pruned.text) == alone(asker, "How many?")


def test_a_full_line_refuses(asker, monkeypatch):
    monkeypatch.setattr(asker, "_line", Line(0))
    first = asker.ask(SCENE, QUESTION, **LONG)
    next(first)
    with pytest.raises(PopError, match="wait already"):
        list(asker.ask(SCENE, QUESTION, **SETTINGS))
    first.close()


CHAT = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' ' }}{% endfor %}"


def test_each_side_of_a_chat_goes_on_from_its_own_answers(tmp_path):
    asker = Asker.load(save(tmp_path, intermediate_size=64))
    earlier = [Turn("w1 w2", "w3 w4", "w5 w6")]
    with pytest.raises(PopError, match="no earlier turns"):
        list(asker.ask(None, "w7", earlier=earlier, **SETTINGS))
    asker._tokenizer.chat_template = CHAT
    assert asker.chats
    (*_, last) = asker.ask(None, "w7 w8", earlier=earlier, **SETTINGS)
    for said, answer in (("w3 w4", last.dense), ("w5 w6", last.pruned)):
        turns = [("user", "w1 w2"), ("assistant", said), ("user", "w7 w8")]
        text = asker._tokenizer.apply_chat_template(
            [dict(role=role, content=text) for role, text in turns], tokenize=False
        )
        inputs = asker._tokenizer(text, return_tensors="pt")
        config = PopConfig(0.4)
        with prune(asker.model, config) if answer is last.pruned else nullcontext():
            output = asker.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=12)
        assert tuple(output[0, inputs["input_ids"].shape[1] :].tolist()) == answer.ids
    shown = panels(last, PopConfig(0.4), 12, "w7 w8", earlier)
    assert "w3 w4" in shown[0] and "w5 w6" in shown[1] and "w5 w6" not in shown[0]


def test_a_text_model_answers_without_image(tmp_path):
    asker = Asker.load(save(tmp_path, intermediate_size=64))
    assert not asker.takes_images
    (*_, last) = asker.ask(None, "w5 w9 w11", **SETTINGS)
    assert last.dense.text and last.pruned.done and last.report.config.ratio == 0.4
    assert 0.4 <= asker.amounts(PopConfig(0.4))[-1] < 0.8
    assert 0 < asker.amounts(PopConfig())[0] < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "There is no image"),
        ({"question": "  "}, "The question is empty"),
        ({"question": "a" * 4001}, "4001 characters; 4000 is the most"),
        ({"question": "\ud800"}, "no Unicode text"),
        ({"question": "a" * 4000}, "the model's context is|tokens"),
        ({"ratio": 0.9}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"method_settings": {"gamma": -1}}, "gamma"),
        ({"max_new_tokens": 257}, "1 to 256 tokens; got 257"),
        ({"image": b"%PDF-1.7 ..."}, "a PDF document"),
        ({"image": io.BytesIO(b"\0" * (10 * 2**20 + 1))}, "10"),
        ({"image": Image.new("1", (20000, 20000))}, "pixels"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(asker, change, message, monkeypatch):
    monkeypatch.setattr(asker.model.config.text_config, "max_position_embeddings", 512)
    asked = {"image": SCENE, "question": QUESTION, **SETTINGS, **change}
    with pytest.raises(PopError, match=message):
        list(asker.ask(asked.pop("image"), asked.pop("question"), **asked))


@pytest.mark.parametrize("which", ["dense", "pruned"])
@pytest.mark.parametrize("how", ["close", "forget"])
def test_closing_in_the_middle_restores_the_model(asker, which, how):
    before = fingerprint(asker.model)
    steps = asker.ask(SCENE, QUESTION, **LONG)
    for step in steps:
        if getattr(step, which).tokens == 3:
            break
    assert asker.busy
    if how == "close":
        steps.close()
    else:
        del steps
        gc.collect()
    idle(asker)
    assert changes(asker, before) == []
    (*_, last) = asker.ask(SCENE, QUESTION, **SETTINGS)
    assert (last.dense.text, last.pruned.text) == alone(asker)


def test_an_error_while_the_model_is_pruned_restores_it(asker, monkeypatch):
    calls, generate = [], asker.model.generate

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            generate(*args, **{**kwargs, "max_new_tokens": 3})
            raise RuntimeError("out of memory")
        return generate(*args, **kwargs)

    before = fingerprint(asker.model)
    with monkeypatch.context() as patch:
        patch.setattr(asker.model, "generate", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(asker.ask(SCENE, QUESTION, **SETTINGS))
    idle(asker)
    assert changes(asker, before) == []


def test_two_threads_are_answered_one_after_the_other(asker):
    questions, found = ["What do you see?", "Where is it?", "How many?"], {}

    def ask(question):
        steps = list(asker.ask(SCENE, question, **SETTINGS))
        found[question] = steps[-1].dense.text, steps[-1].pruned.text

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {question: alone(asker, question) for question in questions}


def test_gradio_is_imported_late():
    assert not EARLY


def test_a_missing_gradio_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as ended:
        main(["app", "--model", "tiny-vlm"])
    assert ended.value.code == 2
    assert 'pip install "pop_mm[app]"' in capsys.readouterr().err


# the server -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(asker):
    names = ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy")
    environment = [os.environ.get(name) for name in names]
    with serve(asker, free_port(), PopConfig(0.4)) as served:
        yield served
    assert [os.environ.get(name) for name in names] == environment


def said(panel):
    """The answer in a panel of HTML."""
    (text,) = re.findall("<p class='pop-text'>(.*?)</p>", panel, re.S)
    return unescape(re.sub("</?mark>", "", text))


@needs_gradio
def test_users_are_queued_and_never_mixed(asker, served):
    from gradio_client import Client, handle_file

    client = Client(served.url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": 120})
    questions = ["What do you see?", "Where is it?", "How many?"]
    jobs = [client.submit(handle_file(str(SCENE)), question, 0.4, 0.1, 12, api_name="/ask") for question in questions]
    answers = [job.result(timeout=120) for job in jobs]
    assert [tuple(map(said, answer[:2])) for answer in answers] == [alone(asker, question) for question in questions]
    refused = client.predict(handle_file(str(SCENE)), " ", 0.4, 0.1, 12, api_name="/ask")
    assert "The question is empty" in refused[2] and not said(refused[0]) and not said(refused[1])


@needs_gradio
def test_other_machines_and_other_files_stay_out(served, tmp_path):
    import httpx

    assert served.url.startswith("http://127.0.0.1:")
    port = int(served.url.rstrip("/").rsplit(":", 1)[1])
    own = socket.gethostbyname(socket.gethostname())
    if not own.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((own, port), timeout=2)
    assert httpx.get(served.url, headers={"host": "example.org"}).status_code == 400
    policy = httpx.get(served.url).headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy
    secret = tmp_path / "secret.png"
    secret.write_bytes(SCENE.read_bytes())
    assert httpx.get(f"{served.url}gradio_api/file={secret}").status_code == 403
    large = {"files": ("large.png", b"\0" * (10 * 2**20 + 1))}
    assert httpx.post(f"{served.url}gradio_api/upload", files=large).status_code == 413


@needs_gradio
def test_a_taken_port_is_named(asker, served):
    port = int(served.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(PopError, match="--port"), serve(asker, port):
        pass
