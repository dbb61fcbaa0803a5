"""What a command does when something fails that is nobody's mistake: one sentence, and whatever was asked for is saved."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer

import pop_mm.bench.show
import pop_mm.cli.generate
import pop_mm.evaluation.show
from helpers.tiny_folder import WORDS, save
from helpers.tiny_models import VOCAB, tiny
from helpers.tiny_vlm_folder import save_vlm
from pop_mm.cli import main
from pop_mm.cli.terminal import write_json
from pop_mm.inputs import TokenError, check_tokens, context_of
from pop_mm.samples import load_vision
from pop_mm.vision import prepare

pytestmark = pytest.mark.usefixtures("wide_terminal_and_no_network")

PROMPT = "w5 w9 w40 w7 w22"
EVAL = ("--prompt", 12, "--continuation", 5, "--generate", 2, "--scope", "ffn", "--ratio", 0.4)
BENCH = ("--prompt", 8, "--new-tokens", 4, "--rounds", 1, "--kernels", "stock", "--ratio", 0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def chinese(folder, tmp_path_factory) -> str:
    """A model whose answers no single-byte encoding has."""
    target = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "chinese")
    values = json.loads((target / "tokenizer.json").read_text())
    values["model"]["vocab"] = {word if i in (0, 5, 6) else f"\u4f60{i}": i for i, word in enumerate(WORDS)}
    (target / "tokenizer.json").write_text(json.dumps(values))
    return str(target)


@pytest.fixture(scope="module")
def too_many_tokens(folder, tmp_path_factory) -> str:
    """A model whose tokenizer got a token that its embedding has no row for."""
    target = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "more")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(target)
    return str(target)


@pytest.fixture
def prose(tmp_path) -> Path:
    ids = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    (tmp_path / "prose.txt").write_text(" ".join(f"w{i}" for i in ids))
    return tmp_path / "prose.txt"


def is_a_sentence(err: str, *parts: str) -> bool:
    return (
        err.startswith("Error: ") and err.count("\n") == 1 and "Traceback" not in err and all(p in err for p in parts)
    )


# failures that nobody expected ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (IndexError("index out of\n range"), "IndexError: index out of range (set POP_MM_TRACEBACK=1 to see where)."),
        (MemoryError(), "MemoryError (set POP_MM_TRACEBACK=1 to see where)."),
        (OSError(2, "No such file", "a.so"), "FileNotFoundError: [Errno 2] No such file: 'a.so' (set"),
    ],
)
def test_an_unexpected_error_is_a_sentence_with_code_1(call, folder, monkeypatch, error, said):
    def fail(*_, **__):
        raise error

    monkeypatch.delenv("POP_MM_TRACEBACK", raising=False)
    monkeypatch.setattr(pop_mm.cli.generate, "answer", fail)
    code, out, err = call("generate", "--model", folder, "--prompt", PROMPT)
    assert (code, out) == (1, "")
    assert is_a_sentence(err, said)
    monkeypatch.setenv("POP_MM_TRACEBACK", "1")
    code, _, err = call("generate", "--model", folder, "--prompt", PROMPT)
    assert code == 1
    assert err.startswith("Traceback") and "in fail" in err
    assert is_a_sentence(err.splitlines(keepends=True)[-1], said.split(" (set")[0])


# saved first ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_encoding(monkeypatch):
    """``in_encoding("cp1252", ...)``: exit code and bytes on a stdout of that encoding."""

    def run(encoding, *arguments, errors="strict"):
        raw = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
            with pytest.raises(SystemExit) as stop:
                main([str(argument) for argument in arguments])
            sys.stdout.flush()
            return stop.value.code, raw.getvalue()

    return run


@pytest.mark.parametrize(
    ("encoding", "errors"), [("cp1252", "strict"), ("ascii", "strict"), ("ascii", "surrogateescape")]
)
def test_what_the_terminal_cannot_print_is_replaced(in_encoding, call, chinese, tmp_path, encoding, errors):
    asked = ("generate", "--model", chinese, "--prompt", "w5 w6", "--max-new-tokens", 8)
    code, out = in_encoding(
        encoding, *asked, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", errors=errors
    )
    assert code == 0
    values = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    expected = json.loads(call(*asked, "--json", "-")[1])
    assert values["dense"]["text"] == expected["dense"]["text"]
    assert "\u4f60" in values["dense"]["text"]
    assert values["dense"]["text"].split()[0].replace("\u4f60", "?").encode() in out
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_choice_of_the_user_stays(in_encoding, chinese):
    asked = ("generate", "--model", chinese, "--prompt", "w5 w6", "--max-new-tokens", 8)
    code, out = in_encoding("ascii", *asked, errors="backslashreplace")
    assert code == 0 and rb"\u4f60" in out


def test_a_name_that_no_encoding_has_is_saved(tmp_path):
    write_json({"model": "caf\udce9 \u4f60"}, str(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"model": "caf\udce9 \u4f60"}


class Full(io.StringIO):
    """A stdout on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.fixture
def commands(folder, prose, tmp_path):
    """Every command that saves something, and the files that it saves."""
    model, files = ("--model", folder), {name: tmp_path / name for name in ("a.json", "a.png")}
    images = ("ask", "?", "--model", save_vlm(tmp_path / "vlm"), "--image", tmp_path / "i.png", "--max-new-tokens", 2)
    saves = ("--json", files["a.json"], "--plot", files["a.png"])
    out = tmp_path / "out"
    pop_mm.vision.load_image(b"P6 40 40 255 " + bytes(4800)).save(tmp_path / "i.png")
    return {
        "generate": (("generate", *model, "--prompt", PROMPT, *saves), list(files.values())),
        "ask": ((*images, *saves), list(files.values())),
        "bench": (("bench", *model, *BENCH, *saves), list(files.values())),
        "eval": (
            ("eval", *model, "--text", prose, *EVAL, "--json", files["a.json"], "--output", out),
            [files["a.json"], out / "results.json", out / "results.md", out / "quality.png"],
        ),
    }


@pytest.mark.parametrize("command", ["generate", "ask", "bench", "eval"])
def test_everything_is_saved_before_anything_is_printed(commands, capsys, monkeypatch, command):
    arguments, files = commands[command]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "Error: The output cannot be written: No space left on device.\n"
    assert all(file.stat().st_size > 100 for file in files)
    assert json.loads(files[0].read_text())


@pytest.mark.parametrize("command", ["generate", "ask", "bench", "eval"])
def test_what_cannot_be_saved_keeps_nothing_else_from_it(commands, call, monkeypatch, command):
    def fail(*_, **__):
        raise RuntimeError("no font")

    for place in (
        "pop_mm.report.plotting.save",
        "pop_mm.report.plotting_answer.save",
        "pop_mm.report.plotting_thresholds.save",
    ):
        monkeypatch.setattr(place, fail)
    arguments, files = commands[command]
    code, out, err = call(*arguments)
    assert code == 1
    assert is_a_sentence(err, "RuntimeError: no font")
    assert "dense" in out
    assert [file.name for file in files if file.exists() and file.stat().st_size] == [
        file.name for file in files if file.suffix != ".png"
    ]


def test_a_folder_that_is_gone_at_the_end(commands, call, monkeypatch, tmp_path):
    original = pop_mm.cli.generate.compare

    def removing(*arguments):
        shutil.rmtree(tmp_path / "gone")
        return original(*arguments)

    (tmp_path / "gone").mkdir()
    monkeypatch.setattr(pop_mm.cli.generate, "compare", removing)
    arguments = [str(a).replace("a.json", "gone/a.json") for a in commands["generate"][0]]
    code, out, err = call(*arguments)
    assert code == 2
    assert is_a_sentence(err, "gone/a.json cannot be written: No such file or directory")
    assert "tokens/s" in out and (tmp_path / "a.png").exists()


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 300 + ".png", "~nobodyhere/x.png", "/proc/x.png", ""])
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_path_that_no_file_can_have_is_found_before_the_model_is_loaded(call, option, path):
    code, out, err = call("generate", "--model", "no/such", "--prompt", PROMPT, option, path)
    assert (code, out) == (2, "")
    assert is_a_sentence(err, "cannot be" if path or option == "--json" else "needs one of the suffixes")
    if option == "--json":
        code, _, err = call("eval", "--model", "no/such", "--output", path or " /proc/x".strip())
        assert code == 2 and is_a_sentence(err, "cannot be")


@pytest.mark.parametrize(
    "options",
    [
        ("generate", "--prompt", "w5", "--max-new-tokens", 10**30),
        ("generate", "--prompt", "w5", "--prefill", "partition", "--probe-tokens", 10**30),
        ("eval", "--continuation", 10**30),
        ("bench", "--batch", 10**30),
    ],
)
def test_a_number_that_nothing_can_be_counted_to(call, options):
    code, _, err = call(options[0], "--model", "no/such", *options[1:])
    assert code == 2
    assert is_a_sentence(err, f"Invalid value for '{options[-2]}'", "2147483647")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_process_with_a_full_disk_has_saved(folder, tmp_path):
    command = [sys.executable, "-m", "pop_mm", "generate", "--model", folder, "--prompt", PROMPT]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*command, "--json", tmp_path / "a.json"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "Error: The output cannot be written: No space left on device.\n")
    assert json.loads((tmp_path / "a.json").read_text())


# token ids ------------------------------------------------------------------------------------------------------------


def test_a_token_beyond_the_embedding_is_named(call, too_many_tokens, prose, tmp_path, monkeypatch):
    said = f"token id {VOCAB} ('zebra'), but the model's embedding has {VOCAB} rows (ids 0 to {VOCAB - 1}). Take the"
    model = ("--model", too_many_tokens)
    code, out, err = call("generate", *model, "--prompt", "w5 zebra")
    assert (code, out) == (1, "")
    assert is_a_sentence(err, said)
    assert call("generate", *model, "--prompt", "w5 w6", "--max-new-tokens", 2)[0] == 0
    prose.write_text(prose.read_text() + " zebra" * 20)
    code, _, err = call("eval", *model, "--text", prose, *EVAL, "--output", tmp_path / "out")
    assert code == 1 and is_a_sentence(err, "The text 'prose.txt #4' cannot be scored", said)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr("pop_mm.bench.prompts.load_passages", lambda: {"zoo": "w5 zebra w7"})
    code, _, err = call("bench", *model, *BENCH)
    assert code == 1 and is_a_sentence(err, said)


def test_an_image_prompt_with_a_token_beyond_the_embedding(call, tmp_path):
    folder = save_vlm(tmp_path / "vlm")
    model, processor = load_vision(folder)
    rows = model.get_input_embeddings().num_embeddings
    processor.tokenizer.add_tokens([f"zebra{i}" for i in range(rows - len(processor.tokenizer) + 1)])
    word = processor.tokenizer.convert_ids_to_tokens(rows)
    with pytest.raises(TokenError, match=rf"token id {rows} \('{word}'\), but the model's embedding has {rows} rows"):
        prepare(processor, None, f"a {word}", model=model)
    assert prepare(processor, None, f"a {word}")["input_ids"].max() == rows, "without a model nothing can be checked"
    processor.save_pretrained(folder)
    pop_mm.vision.load_image(b"P6 40 40 255 " + bytes(4800)).save(tmp_path / "i.png")
    code, _, err = call("ask", f"a {word}", "--model", folder, "--image", tmp_path / "i.png", "--max-new-tokens", 2)
    assert code == 1 and is_a_sentence(err, f"token id {rows} ('{word}')")


def test_ids_of_images_may_lie_beyond_the_embedding():
    model = tiny("llama")
    ids = torch.tensor([[5, VOCAB + 3]])
    with pytest.raises(TokenError, match=f"token id {VOCAB + 3}, but"):
        check_tokens(model, ids)
    with pytest.raises(TokenError, match="token id -1, but"):
        check_tokens(model, torch.tensor([5, -1]))
    model.config.image_token_id = VOCAB + 3
    check_tokens(model, ids)
    check_tokens(model, torch.tensor([[0, VOCAB - 1]]))


def test_a_special_token_beyond_the_embedding(call, folder, tmp_path):
    target = shutil.copytree(folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.add_tokens([AddedToken("<|user|>", special=True)], special_tokens=True)
    tokenizer.chat_template = "{% for m in messages %}<|user|> {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(target)
    code, _, err = call("generate", "--model", target, "--prompt", "w5")
    assert code == 1 and is_a_sentence(err, f"token id {VOCAB} ('<|user|>')")
    assert call("generate", "--model", target, "--prompt", "w5", "--no-chat", "--max-new-tokens", 2)[0] == 0


# context --------------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("model_type", "settings", "tokens", "fixed"),
    [
        ("llama", {}, 128, False),
        ("llama", {"max_position_embeddings": 40, "rope_parameters": YARN}, 128, False),
        ("llama", {"max_position_embeddings": 300, "rope_parameters": YARN}, 300, False),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 256, False),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 256, False),
        ("llama", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 64}}, 128, False),
        ("jamba", {}, 128, False),
        *((name, {}, 128, True) for name in ("gpt2", "opt", "gptj", "codegen", "gpt_neo", "biogpt", "gpt_bigcode")),
    ],
)
def test_the_context_of_a_model(model_type, settings, tokens, fixed):
    model = tiny(model_type, **settings)
    found = context_of(model)
    assert (found.tokens, found.fixed) == (tokens, fixed)
    ids = torch.full((1, model.config.max_position_embeddings + 1), 5)
    with torch.no_grad():
        if fixed:  # it cannot, indeed
            with pytest.raises((IndexError, RuntimeError)):
                model(ids)
        else:
            assert model(ids).logits.isfinite().all()


def test_a_longer_answer_than_the_context_is_given_with_a_warning(call, tmp_path, prose):
    scaled = save(tmp_path / "yarn", max_position_embeddings=40, rope_parameters=YARN)
    asked = ("generate", "--model", scaled, "--prompt", PROMPT, "--max-new-tokens")
    assert call(*asked, 123)[::2] == (0, ""), "40 are the trained positions, 128 the scaled ones"
    code, out, err = call(*asked, 124, "--json", "-")
    assert code == 0
    assert json.loads(out)["report"]["forwards"]["decode"] == 123
    assert err.startswith(
        "Warning: The prompt has 5 tokens and --max-new-tokens asks for 124 more, but the model's context is 128 tokens: "
    )
    code, _, err = call("eval", "--model", scaled, "--text", prose, *EVAL[:-2], "--ratio", 0.4, "--generate", 120)
    assert code == 0 and "Warning: --prompt and --continuation or --generate ask for 132 tokens, but" in err
    code, out, _ = call("bench", "--model", scaled, *BENCH[2:], "--prompt", 126, "--json", "-")
    assert code == 0
    assert json.loads(out)["notes"][0].startswith(
        "Prompts of 126 tokens and 4 new ones are 130, but the model's context"
    )


def test_positions_that_the_model_does_not_have_are_refused(call, tmp_path, prose):
    learned = save(tmp_path / "gpt2", "gpt2")
    code, out, err = call("generate", "--model", learned, "--prompt", PROMPT, "--max-new-tokens", 124)
    assert (code, out) == (2, "") and is_a_sentence(err, "context is 128 tokens, and it has no positions beyond")
    assert call("generate", "--model", learned, "--prompt", PROMPT, "--max-new-tokens", 123)[0] == 0
    code, _, err = call("eval", "--model", learned, "--text", prose, *EVAL[:-2], "--ratio", 0.4, "--generate", 120)
    assert code == 2 and is_a_sentence(err, "ask for 132 tokens", "no positions beyond")
