"""The server of ``pop-mm serve``, asked by OpenAI's own client: answers are those of ``prune`` and ``generate``."""

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

pytest.importorskip("openai", reason="the extra [serve]")
import httpx
import openai
import psutil

import pop_mm.cli.serve
from helpers.observe import differences, fingerprint
from helpers.pages import ROOT
from helpers.serve_model import (
    BUDGETS,
    LIMITS,
    Expected,
    ask,
    client_of,
    data_url,
    folder_of,
    metrics,
    question,
    until,
)
from helpers.tiny_vlm_folder import save_vlm
from pop_mm import PopConfig, prune
from pop_mm.app.examples import SCENES
from pop_mm.engines.server.errors import RequestError
from pop_mm.engines.server.run import Limits, ServedModel, ServeError, prepared, serve
from pop_mm.samples import load, load_vision
from pop_mm.vision import decode, prepare_chats

NAME = "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("serve") / "llama")


@pytest.fixture(scope="module")
def expected(folder):
    return Expected(folder)


@pytest.fixture(scope="module")
def serving(folder):
    model, tokenizer = load(folder)
    before = fingerprint(model)
    with serve(ServedModel(NAME, model, tokenizer, PopConfig()), limits=LIMITS) as serving:
        yield serving
    assert not differences(before, fingerprint(model))


@pytest.fixture(scope="module")
def narrow(folder):
    """A server of POP in which one request may wait, and a body must come at once."""
    limits = Limits(max_new_tokens=400, waiting=1, body_seconds=0.3)
    with serve(ServedModel(NAME, *load(folder), PopConfig(budget=0.8, method="pop")), limits=limits) as narrow:
        yield narrow


@pytest.fixture(scope="module")
def client(serving):
    return client_of(serving)


@pytest.fixture
def still_right(serving, client, expected):
    """After the test the server is idle, and answers the next request."""
    yield
    until(lambda: not serving.line.running and not serving.line.waiting, "nothing runs or waits")
    assert ask(client, NAME, question(99)).choices[0].message.content == expected.answer(question(99))


# answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("amount", BUDGETS, ids=str)
def test_answers_are_those_of_prune_and_generate(client, expected, amount, stream):
    answer = ask(client, NAME, question(1), stream=stream, **amount)
    parts = list(answer) if stream else [answer]
    choice = parts[-1].choices[0]
    text = "".join(part.choices[0].delta.content or "" for part in parts) if stream else choice.message.content
    assert text == expected.answer(question(1), **amount)
    assert choice.finish_reason == "length"
    usage = parts[-1].usage
    assert (usage.completion_tokens, usage.prompt_tokens) == (12, 25)
    said = usage.pop_mm
    if amount in ({"budget": 1}, {"ratio": 0}):
        assert said == {"method": "dense", "budget": 1.0, "ratio": None, "kept_share": 1.0}
    else:
        assert said["method"] == ("pop" if "ratio" in amount else "thresholds")
        assert said["budget"] == (None if "ratio" in amount else amount.get("budget", 0.65))
        assert 0.3 < said["kept_share"] < 0.95


def test_budget_1_is_the_model_itself(folder):
    model, tokenizer = load(folder)
    served = ServedModel(NAME, model, tokenizer, PopConfig())
    before = fingerprint(model)
    served.use(PopConfig(budget=0.5))
    assert differences(before, fingerprint(model))
    served.use(PopConfig(budget=1, method="pop", kernels="compiled"))
    assert not differences(before, fingerprint(model))


def test_fifty_at_once_are_each_answered_as_alone(serving, client, expected):
    asked = [(number % 12, {"budget": 0.5} if number % 25 == 0 else {}, number % 2 == 0) for number in range(50)]

    def one(given):
        number, amount, stream = given
        answer = ask(client, NAME, question(number), 6, stream=stream, **amount)
        if not stream:
            return answer.choices[0].message.content
        return "".join(part.choices[0].delta.content or "" for part in answer)

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(one, asked))
    assert answers == [expected.answer(question(number), 6, **amount) for number, amount, _ in asked]
    assert len(set(answers)) > 10


def test_samples_depend_on_their_own_seed_alone(client, expected):
    asked = [(seed, question(seed)) for seed in (1, 2, 3)] * 3
    with ThreadPoolExecutor(9) as pool:
        answers = list(
            pool.map(lambda given: ask(client, NAME, given[1], seed=given[0], temperature=0.9, stream=False), asked)
        )
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts == [expected.answer(text, seed=seed) for seed, text in asked]
    free = {ask(client, NAME, question(1), temperature=0.9).choices[0].message.content for _ in range(3)}
    assert len(free) == 3, "without a seed, samples differ"


def test_stops_and_variables_of_the_template(client, expected):
    whole = expected.answer(question(5))
    word = whole.split()[4]
    until_then = next(said for count in range(1, 13) if word in (said := " ".join(whole.split()[:count])))
    answer = ask(client, NAME, question(5), stop=[word])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content == until_then, "the stop text included"
    shouted = ask(client, NAME, question(5), chat_template_kwargs={"shout": True})
    assert shouted.usage.prompt_tokens == 26
    assert ask(client, NAME, question(5), temperature=0).choices[0].message.content == whole


def test_tools_and_their_results_reach_the_template(client, expected):
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
    assert ask(client, NAME, question(5), tools=tools).usage.prompt_tokens == 27
    plain = ask(client, NAME, question(5), tools=tools, tool_choice="none")
    assert plain.choices[0].message.content == expected.answer(question(5))
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "w5 w6"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "w9"}]},
    ]
    answer = client.chat.completions.create(model=NAME, messages=turns, tools=tools, max_tokens=4)
    assert answer.usage.prompt_tokens == 2 + 3 + 1 + 2


def test_without_a_length_the_answer_is_as_long_as_may_be(client):
    answer = ask(client, NAME, question(3), tokens=None)
    assert answer.usage.completion_tokens == LIMITS.max_new_tokens
    answer = ask(client, NAME, question(3, 200), tokens=None)
    assert answer.usage.completion_tokens == 512 - answer.usage.prompt_tokens


def test_models_health_and_metrics(serving, client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="one model, 'tiny'"):
        client.models.retrieve("other")
    assert httpx.get(f"{serving.url}/health", trust_env=False).json() == {"status": "ok"}
    before = metrics(serving)
    answer = ask(client, NAME, question(4), budget=0.5)
    after = metrics(serving)

    def more(name):
        return after[name] - before.get(name, 0)

    assert more('pop_mm_requests_total{status="200"}') == 1
    assert (more("pop_mm_prompt_tokens_total"), more("pop_mm_completion_tokens_total")) == (25, 12)
    assert more("pop_mm_kept_share_sum") == pytest.approx(answer.usage.pop_mm["kept_share"], rel=1e-6)
    assert after["pop_mm_requests_waiting"] == after["pop_mm_requests_running"] == 0
    assert after["pop_mm_pruned_parts"] == 6


# what is refused ------------------------------------------------------------------------------------------------------

GOOD = {"model": NAME, "messages": [{"role": "user", "content": question(1)}], "max_tokens": 4}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def but(**changes):
    return {**GOOD, **changes}


def said(content, role="user"):
    return but(messages=[{"role": role, "content": content}])


HOSTILE = {
    "malformed": (b'{"model": ', 400, "not valid JSON"),
    "no JSON at all": (b"\xff\xfe\x00", 400, "not valid JSON"),
    "deep": (b"[" * 100_000, 400, "not valid JSON: it is nested too deeply"),
    "too many digits": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not valid JSON: it has a number of 5,000 digits"),
    "a list": (b"[1]", 400, "must be a JSON object; got list"),
    "NaN": (b'{"temperature": NaN}', 400, "NaN is no number"),
    "empty": (b"", 400, "not valid JSON"),
    "no messages": ({"model": NAME}, 400, "messages must be a list of at least one"),
    "empty messages": (but(messages=[]), 400, "at least one"),
    "messages are text": (but(messages="hello"), 400, "must be a list"),
    "a message is text": (but(messages=["hello"]), 400, r"messages\[0\] must be an object"),
    "no role": (but(messages=[{"content": "x"}]), 400, r"messages\[0\].role must be one of system"),
    "a role of its own": (said("x", "wizard"), 400, r"messages\[0\].role"),
    "content is a number": (said(3), 400, r"messages\[0\].content must be a text"),
    "no content": (said(None), 400, r"messages\[0\].content must be a text"),
    "a part of its own": (said([{"type": "input_audio"}]), 400, r"content\[0\] must be"),
    "a text that is none": (said([{"type": "text", "text": 3}]), 400, r"content\[0\] must be"),
    "half a character": (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', 400,
                         r"content has half of a character, '\\ud800', at place 1"),
    "half a character in a part": (said([{"type": "text", "text": "\udc00"}]), 400, r"content\[0\].text has half of"),
    "a picture for a text model": (said([IMAGE]), 400, "takes text alone"),
    "another model": (but(model="gpt-4"), 404, "one model, 'tiny'; 'gpt-4' was asked for"),
    "a model that is no text": (but(model=[1]), 400, "model must be a text"),
    "huge max_tokens": (but(max_tokens=10**9), 400, "answers of at most 400 tokens"),
    "enormous max_tokens": (but(max_tokens=10**400), 400, "answers of at most 400 tokens"),
    "max_tokens of 0": (but(max_tokens=0), 400, "max_tokens must be an integer from 1"),
    "max_tokens in words": (but(max_tokens="many"), 400, "must be an integer"),
    "max_tokens true": (but(max_tokens=True), 400, "must be an integer"),
    "beyond the context": (but(messages=[{"role": "user", "content": question(1, 300)}], max_tokens=300), 400,
                           "ask for at most 211"),
    "a prompt beyond it": (said(question(1, 600)), 400, "have 601 tokens, and the model's context is 512"),
    "budget 0": (but(budget=0), 400, r"budget must be a number in \(0, 1\]"),
    "budget 1.5": (but(budget=1.5), 400, r"budget must be a number in \(0, 1\]"),
    "budget in words": (but(budget="half"), 400, "budget must be a number"),
    "ratio 1": (but(ratio=1), 400, r"ratio must lie in \[0, 1\)"),
    "ratio beyond the model's": (but(ratio=0.99), 400, "ratio"),
    "budget and ratio": (but(budget=0.5, ratio=0.2), 400, "both given"),
    "temperature": (but(temperature=-1), 400, "temperature must be a number from 0"),
    "temperature of a list": (but(temperature=[1]), 400, "temperature must be a number"),
    "top_p": (but(top_p=2), 400, "top_p must be a number from 0 to 1"),
    "stream": (but(stream="yes"), 400, "stream must be true or false"),
    "seed": (but(seed=-1), 400, "seed must be an integer from 0"),
    "stop": (but(stop=[1]), 400, "stop must be at most 4 texts"),
    "logit_bias": (but(logit_bias={"x": 1}), 400, "logit_bias must map"),
    "a bias of no token": (but(logit_bias={"100000": 1}), 400, "logit_bias: the model has no token 100000"),
    "n": (but(n=2), 400, "n is not supported"),
    "logprobs": (but(logprobs=True), 400, "logprobs is not supported"),
    "response_format": (but(response_format={"type": "json_object"}), 400, "response_format is not supported"),
    "a config of its own": (but(generation_config="{}"), 400, "generation_config is not supported"),
    "a template of its own": (but(chat_template_kwargs={"chat_template": "x"}), 400, "no variable 'chat_template'"),
    "an argument": (but(chat_template_kwargs={"tokenize": False}), 400, "no variable 'tokenize'"),
    "tools": (but(tools=[1]), 400, "tools must be a list"),
    "a typing error": (but(budgets=0.5), 400, "Unknown field 'budgets' .did you mean 'budget'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def raw(serving):
    with httpx.Client(trust_env=False, base_url=serving.url, timeout=30) as raw:
        yield raw


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_cannot_be_asked_is_a_sentence(serving, raw, still_right, stream):
    for name, (body, status, words) in HOSTILE.items():
        if isinstance(body, dict):
            body = json.dumps({"stream": stream, **body}).encode()
        answer = raw.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        error = answer.json()["error"]
        assert answer.status_code == status, (name, error)
        assert re.search(words, error["message"]), (name, error)
        assert error["type"] == "invalid_request_error" and error["message"].endswith(".")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_budget_below_the_methods_least_is_refused_and_then_at_once(narrow, expected, stream):
    client, little = client_of(narrow), 0.05 + 0.01 * stream
    for _ in range(2):
        with pytest.raises(openai.BadRequestError, match="cannot be met by method='pop' on this model"):
            ask(client, NAME, question(1), budget=little, stream=stream)
        changes = metrics(narrow)["pop_mm_session_changes_total"]
        with pytest.raises(openai.BadRequestError, match="cannot be met by method='pop' on this model"):
            ask(client, NAME, question(1), budget=little, stream=stream)
        assert metrics(narrow)["pop_mm_session_changes_total"] == changes
    answer = ask(client, NAME, question(1))
    assert answer.choices[0].message.content == expected.answer(question(1), budget=0.8, method="pop")


def test_bodies_that_are_too_long_or_no_json(serving, raw, still_right, monkeypatch):
    text = question(1) + " " * LIMITS.body_bytes
    for headers in ({}, {"expect": "100-continue"}):
        answer = raw.post("/v1/chat/completions", json=said(text), headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    endless = (b" " * 10_000 for _ in range(1000))
    with suppress(httpx.TransportError):  # cut off before the answer could be read
        answer = raw.post("/v1/chat/completions", content=endless, headers={"content-type": "application/json"})
        assert answer.status_code == 413
    assert raw.post("/v1/chat/completions", content=json.dumps(GOOD)).status_code == 415
    assert raw.get("/v1/chat/completions").status_code == 405
    missing = raw.get("/v1/nothing")
    assert missing.status_code == 404 and "/v1/chat/completions" in missing.json()["error"]["message"]
    other = raw.get("/health", headers={"host": "evil.example"})
    assert other.status_code == 400, "a name that a web page may have made up for 127.0.0.1"


def test_a_body_that_does_not_come(narrow):
    with connected(narrow) as sock:
        sock.sendall(head(1000) + b"{")
        sock.settimeout(20)
        assert sock.recv(1000).startswith(b"HTTP/1.1 408")


# who leaves -----------------------------------------------------------------------------------------------------------


def connected(serving):
    host, port = serving.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def head(length):
    lines = ["POST /v1/chat/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
    return ("\r\n".join([*lines, f"content-length: {length}"]) + "\r\n\r\n").encode()


def request(**changes):
    body = json.dumps(but(**changes)).encode()
    return head(len(body)) + body


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_who_leaves_half_way_stops_the_answer(serving, still_right, stream):
    before = metrics(serving)
    with connected(serving) as sock:
        sock.sendall(request(max_tokens=400, stream=stream))
        until(lambda: serving.line.running, "it runs")
        if stream:
            sock.recv(2000)
    until(lambda: not serving.line.running, "the slot is free")
    after = metrics(serving)
    assert after["pop_mm_cancelled_total"] - before.get("pop_mm_cancelled_total", 0) == 1
    assert after["pop_mm_completion_tokens_total"] - before["pop_mm_completion_tokens_total"] < 400


def test_a_killed_client_frees_its_slot(serving, still_right):
    host, port = serving.url.removeprefix("http://").split(":")
    code = (
        f"import socket, time; s = socket.create_connection(({host!r}, {port})); "
        f"s.sendall({request(max_tokens=400, stream=True)!r}); print(len(s.recv(100)), flush=True); time.sleep(60)"
    )
    before = metrics(serving)["pop_mm_completion_tokens_total"]
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.kill()
    process.wait()
    until(lambda: not serving.line.running, "the slot is free")
    assert metrics(serving)["pop_mm_completion_tokens_total"] - before < 400


def test_who_leaves_while_waiting_is_not_answered(serving, client, still_right):
    with connected(serving) as first:
        first.sendall(request(max_tokens=400, stream=True))
        until(lambda: serving.line.running, "the first runs")
        with connected(serving) as second, connected(serving) as third:
            second.sendall(request(stream=True))
            third.sendall(request())
            until(lambda: serving.line.waiting == 2, "two wait")
        until(lambda: serving.line.waiting == 0, "nobody waits")


def test_a_full_line_refuses(narrow, expected):
    client = client_of(narrow)
    with connected(narrow) as first, connected(narrow) as second:
        first.sendall(request(max_tokens=400, stream=True))
        until(lambda: narrow.line.running, "the first runs")
        second.sendall(request(stream=True))
        until(lambda: narrow.line.waiting == 1, "the second waits")
        with pytest.raises(openai.InternalServerError, match="1 requests wait already") as caught:
            ask(client, NAME, question(1))
        assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"] == "1"
    until(lambda: not narrow.line.running, "both have gone")
    answer = ask(client, NAME, question(1), ratio=0.3)
    assert answer.choices[0].message.content == expected.answer(question(1), ratio=0.3)


# errors and the end ---------------------------------------------------------------------------------------------------


def test_an_error_while_generating_is_said_and_the_next_request_works(serving, client, still_right, monkeypatch):
    def fail(self):
        raise ArithmeticError('no "number"')

    monkeypatch.setattr(ServedModel, "said", fail)
    with pytest.raises(openai.InternalServerError, match='could not be generated: no "number"'):
        ask(client, NAME, question(1))
    with pytest.raises(openai.APIError, match='could not be generated: no "number"'):
        list(ask(client, NAME, question(1), stream=True))
    monkeypatch.undo()


def test_ending_stops_answers_and_restores_the_model(folder):
    model, tokenizer = load(folder)
    before = fingerprint(model)
    found = []
    with serve(ServedModel(NAME, model, tokenizer, PopConfig()), limits=LIMITS) as serving:
        client = client_of(serving)

        def read():
            try:
                list(ask(client, NAME, question(1), 400, stream=True))
            except openai.APIError as error:
                found.append(str(error))

        thread = threading.Thread(target=read)
        thread.start()
        until(lambda: serving.line.running, "it runs")
    thread.join()
    assert found == ["The server is shutting down."]
    assert not differences(before, fingerprint(model))


def test_what_cannot_be_served_is_said_first(folder, tmp_path):
    model, tokenizer = load(folder)
    with (
        pytest.raises(RequestError, match="cannot be met by method='pop'"),
        prepared(ServedModel(NAME, model, tokenizer, PopConfig(budget=0.05, method="pop")), port=0),
    ):
        pass
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(ServeError, match="cannot be used"),
        prepared(ServedModel(NAME, model, tokenizer, PopConfig()), port=taken.getsockname()[1]),
    ):
        pass
    bare = folder_of(tmp_path, None)
    with pytest.raises(RequestError, match="has no chat template"):
        ServedModel.load(bare, PopConfig())


def test_the_soak_tells_what_is_wrong(serving, still_right, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import serve_soak

    soak = serve_soak.Soak(serving.url, psutil.Process(), pictures=False)
    soak.run(20, 3)
    assert sum(soak.outcomes.values()) == 20 and len(soak.memory) == serve_soak.MARKS
    until(lambda: not serving.line.running and not serving.line.waiting, "nothing runs or waits")
    text = httpx.get(f"{serving.url}/metrics", trust_env=False).text
    assert [verdict.passed for verdict in serve_soak.judge(soak, text, 130, judged=False)] == [None, *[True] * 4]
    soak.outcomes["text 500"] += 1
    soak.same.add("another answer")
    soak.memory.append((21, 2 * soak.memory[-1][1]))
    assert [verdict.passed for verdict in serve_soak.judge(soak, "", 1, judged=True)] == [False] * 5


# pictures -------------------------------------------------------------------------------------------------------------

SCENE = SCENES / "two-blue.png"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    served = ServedModel.load(save_vlm(tmp_path_factory.mktemp("vlm")), PopConfig())
    with serve(served, limits=Limits(max_new_tokens=64, pixels=20_000)) as serving:
        yield serving


def look(serving, url, **more):
    parts = [{"type": "text", "text": "How many?"}, {"type": "image_url", "image_url": {"url": url}}]
    return ask(client_of(serving), serving.served.name, parts, 8, **more)


def test_pictures_are_those_of_prepare(seeing):
    model, processor = load_vision(seeing.served.name)
    chat = [{"role": "user", "content": [{"type": "text", "text": "How many?"}, {"type": "image", "image": SCENE}]}]
    inputs = prepare_chats(processor, chat, model=model)
    for amount in ({"budget": 0.6}, {"ratio": 0.3}):
        with prune(model, **amount):
            output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
        wanted = decode(processor, output, inputs)[0]
        content = look(seeing, data_url(SCENE), **amount).choices[0].message.content
        assert content == wanted.strip(), "transformers' parser strips the answers of Qwen models"
        streamed = look(seeing, data_url(SCENE), stream=True, **amount)
        assert "".join(part.choices[0].delta.content or "" for part in streamed) == wanted.rstrip("\ufffd")


def test_the_sample_answers_right():
    served = ServedModel.load("tiny-vlm", PopConfig())
    with serve(served) as serving:
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(SCENE)}},
            {"type": "text", "text": "How many blue shapes are there?"},
        ]
        content = ask(client_of(serving), "tiny-vlm", parts, 32, temperature=0).choices[0].message.content
    assert re.search(r"\b(two|2)\b", content, re.IGNORECASE)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/a.png", "is a URL, and this server fetches and opens nothing"),
        ("https://example.org/a.png", "is a URL"),
        ("file:///etc/passwd", "is a URL"),
        ("/etc/passwd", "is no data: URL"),
        ("data:image/png;base64,AAAA", "not an image that can be read"),
        ("data:image/png;base64,***", "base64 data of an image is damaged"),
        ("data:,hello", "not of the form"),
        (data_url(SCENE)[:-400], "damaged|decoded"),
        (None, "image_url must be"),
    ],
)
def test_pictures_that_cannot_be_used(seeing, url, words):
    with pytest.raises(openai.BadRequestError, match=words):
        look(seeing, url)


def test_pictures_are_bounded_together(seeing):
    with pytest.raises(openai.BadRequestError, match="pixels, more than"):
        ask(client_of(seeing), seeing.served.name, [{"type": "image_url", "image_url": {"url": data_url(SCENE)}}] * 9)


# the command ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_the_command(folder):
    command = [sys.executable, "-m", "pop_mm", "serve", "--model", folder, "--port", "0", "--ratio", "0.3"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as from a terminal, also in the background
    )
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{folder} answers at http://127.0.0.1:") and "/v1, ratio 0.3 (Ctrl-C" in line, line
        url = line.split(" answers at ")[1].split(",")[0]
        asked = urllib.request.Request(
            f"{url}/chat/completions",
            json.dumps({**GOOD, "model": folder}).encode(),
            {"content-type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert json.load(opener.open(asked))["usage"]["pop_mm"]["method"] == "pop"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")


def test_the_extra_is_named_where_it_is_missing(call, monkeypatch):
    monkeypatch.setattr(pop_mm.cli.serve, "find_spec", lambda name: None if name == "openai" else name)
    code, _, err = call("serve", "--model", "tiny-vlm")
    assert code == 2 and 'needs openai, not installed here: pip install "pop_mm[serve]"' in err
