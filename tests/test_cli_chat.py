"""``pop-mm chat``: answers are those of ``generate``, the cache is kept, and Ctrl-C stops an answer alone."""

import io
import os
import signal
import sys

import pytest
import torch
from transformers import AutoTokenizer

import pop_mm
from helpers.observe import differences, fingerprint
from helpers.tiny_folder import save
from helpers.tiny_models import tiny
from pop_mm.cli.chat import Conversation, Streamer
from pop_mm.cli.generate import Sampling
from pop_mm.settings.config import PopConfig

pytestmark = pytest.mark.usefixtures("wide_terminal_and_no_network")
TEMPLATE = "{% for m in messages %}{{ m['role'] == 'user' and 'w7 w8' or '' }} {{ m['content'] }} {% endfor %}w9 w10"
FIRST, SECOND = "w5 w9 w40 w17 w22", "w11 w12 w30"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "llama", "llama", TEMPLATE)


@pytest.fixture
def parts(folder):
    model, tokenizer = tiny("llama"), AutoTokenizer.from_pretrained(folder)
    before = fingerprint(model)
    made = []

    def conversation(config=None, tokens=6, chat=False):
        made.append(Conversation(model, tokenizer, config or PopConfig(0.4), Sampling(tokens, 0.0, 0, chat)))
        return made[-1]

    yield model, tokenizer, conversation
    for each in made:
        each.close()
    assert not differences(before, fingerprint(model))


def said(conversation, tokenizer, text):
    streamer = Streamer(tokenizer, lambda _: None)
    return streamer, conversation.ask(text, streamer)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("config", [PopConfig(0.4), PopConfig(budget=0.6)])
def test_a_second_turn_continues_the_cache_of_the_first(parts, config, chat):
    model, tokenizer, conversation = parts
    talk = conversation(config, chat=chat)
    said(talk, tokenizer, FIRST)
    held = talk._ids.shape[1] - 1
    kept = talk._cache
    said(talk, tokenizer, SECOND)
    whole, prefilled = talk._ids, talk.prefilled
    if not chat:
        assert talk._cache is kept and prefilled == whole.shape[1] - 6 - held
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    talk.close()
    if not chat:
        with pop_mm.prune(model, config):
            first = model.generate(whole[:, :5], max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, whole[:, 11:14]], 1)
            past = first.past_key_values
            mask = torch.ones_like(ids)  # an answer may hold the id of padding
            expected = model.generate(ids, attention_mask=mask, past_key_values=past, max_new_tokens=6, do_sample=False)
        assert torch.equal(whole, expected)


def test_dense_and_pruned_answers(parts):
    model, tokenizer, conversation = parts
    talk = conversation(PopConfig(0.6))
    assert talk.pruned
    _, note = said(talk, tokenizer, FIRST)
    assert "6 tokens" in note and "tokens/s" in note and "% of the weights" in note
    pruned = talk._ids
    talk.reset()
    talk.pruned = False
    _, note = said(talk, tokenizer, FIRST)
    assert note.endswith("dense")
    dense = model.generate(talk._ids[:, :5], max_new_tokens=6, do_sample=False)
    assert torch.equal(talk._ids, dense) and not torch.equal(pruned, dense)
    talk.pruned = True
    said(talk, tokenizer, SECOND)
    assert talk.prefilled == 5 + 6 + 3, "the session has to see the whole conversation"


def test_ctrl_c_stops_an_answer_and_the_next_one_goes_on(parts, interruptible):
    from pop_mm.cli.chat import _interrupts_stop

    _, tokenizer, conversation = parts
    talk = conversation(tokens=50)
    streamer = Streamer(tokenizer, lambda _: len(streamer.times) == 4 and os.kill(os.getpid(), signal.SIGINT))
    with _interrupts_stop(talk):
        note = talk.ask(FIRST, streamer)
    assert note.endswith("stopped") and talk._ids.shape[1] < 5 + 8
    _, note = said(talk, tokenizer, SECOND)
    assert "50 tokens" in note and talk.prefilled <= 4


def test_the_command(call, folder, monkeypatch):
    lines = [FIRST, "/dense", SECOND, "/reset", "/help", "/nothing", "", "/quit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = call("chat", "--model", folder, "--budget", 0.6, "--max-new-tokens", 4)
    assert code == 0
    assert len(out.splitlines()) == 2 and all(len(line.split()) == 4 for line in out.splitlines())
    for part in (
        "pruned (budget 0.6, thresholds)",
        "of the weights]",
        "dense]",
        "forgotten",
        "/reset",
        "There is no /nothing",
    ):
        assert part in err
    monkeypatch.setattr(sys, "stdin", io.StringIO(FIRST))
    code, again, err = call("chat", "--model", folder, "--budget", 0.6, "--max-new-tokens", 4, "-q")
    assert (code, err) == (0, "")
    assert again.splitlines() == out.splitlines()[:1]


def test_half_a_character_waits():
    class Bytes:
        def decode(self, ids, **_):
            return bytes(ids).decode("utf-8", errors="replace")

    shown = []
    streamer = Streamer(Bytes(), shown.append)
    for value in ([1, 2, 3], [104], [0xC3], [0xA9]):
        streamer.put(torch.tensor(value))
    streamer.end()
    assert "".join(shown) == "h\xe9" == streamer.text
