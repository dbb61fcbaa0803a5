import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pop_mm.cli
import pop_mm.cli.generate
from helpers.tiny_folder import WORDS, save
from helpers.tiny_models import tiny
from pop_mm.adapters import support_table
from pop_mm.cli.terminal import write_json
from pop_mm.methods import Pop
from pop_mm.settings.config import PopConfig

ROOT = Path(__file__).parent.parent
PROMPT = "w5 w9 w40 w7 w22"
ANSWER_KEYS = {"text", "decode_tokens_per_s"}
INSPECT_KEYS = {
    *(
        "name",
        "layer",
        "experts",
        "top_k",
        "role",
        "layout",
        "size",
        "ffn_ratio",
        "retained",
        "candidates",
        "pruned",
        "kept",
    ),
    *("backend", "reason", "bytes_per_token_dense", "bytes_per_token_pruned", "weight_format"),
}


pytestmark = pytest.mark.usefixtures("wide_terminal_and_no_network")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


# generate -----------------------------------------------------------------------------------------------------------


def test_generate(call, folder, tmp_path):
    code, out, err = call(
        *("generate", "--model", folder, "--prompt", PROMPT, "--ratio", 0.4, "--max-new-tokens", 12),
        *("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"),
    )
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "a.json").read_text())
    assert set(values) == {"model", "weight_format", "prompt", "config", "dense", "pruned", "report"}
    assert values["model"] == folder
    assert PopConfig.from_dict(values["config"]) == PopConfig(0.4)
    assert set(values["dense"]) == set(values["pruned"]) == ANSWER_KEYS
    for answer in (values["dense"], values["pruned"]):
        assert len(answer["text"].split()) == 12
        assert answer["decode_tokens_per_s"] > 0
        assert answer["text"].split()[0] in out
    assert values["dense"]["text"] != values["pruned"]["text"]
    report = values["report"]
    assert report["prompt_tokens"] == 5
    assert report["forwards"]["prefill"] == 1, "the warm-up is not in the report"
    assert report["forwards"]["decode"] == 11
    assert out.count("tokens/s") == 2
    assert "one run each: a rough figure" in out
    assert re.search(r"tokens/s \(\d+\.\d\dx\)", out)
    assert "40% of attention and FFN" in out
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert str(tmp_path / "a.png") in out.replace("\n", "")


@pytest.mark.parametrize("amount", [{}, {"ratio": 0.2}, {"budget": 0.5}, {"budget": 0.8, "method": "pop"}])
def test_generate_gives_the_answers_of_the_python_api(call, folder, amount):
    options = [word for name, value in amount.items() for word in (f"--{name}", value)]
    code, out, _ = call(
        "generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 8, "--json", "-", *options
    )
    model = tiny("llama", num_hidden_layers=3)
    ids = torch.tensor([[WORDS.index(word) for word in PROMPT.split()]])
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    dense = model.generate(ids, **options)
    with pop_mm.prune(model, **amount):
        pruned = model.generate(ids, **options)
    values = json.loads(out)
    assert code == 0
    for name, output in (("dense", dense), ("pruned", pruned)):
        words = [WORDS[i] for i in output[0, ids.shape[1] :] if i not in (0, 2)]
        assert values[name]["text"].split() == words


def test_ratio_0_answers_like_the_dense_model(call, folder):
    _, out, _ = call("generate", "--model", folder, "--prompt", PROMPT, "--ratio", 0, "--json", "-")
    values = json.loads(out)
    assert values["dense"]["text"] == values["pruned"]["text"]
    assert values["report"]["backends"] == {"dense": 3}


def test_every_setting_reaches_the_session(call, folder):
    code, out, err = call(
        *("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 3, "--json", "-"),
        *("--ratio", 0.5, "--scope", "ffn", "--gamma", 0.3, "--prefill", "partition", "--backend", "masked"),
        *("--dtype", "bfloat16", "--device", "cpu"),
    )
    values = json.loads(out)
    assert code == 0
    wanted = PopConfig(0.5, scope="ffn", method=Pop(gamma=0.3, prefill="partition"), backend="masked")
    assert PopConfig.from_dict(values["config"]) == wanted
    assert values["report"]["backends"] == {"masked": 3}
    assert "run masked, without speed-up" in err, "with --json - the tables are on stderr"


def test_sampling_depends_on_the_seed_alone(call, folder):
    def texts(*options):
        _, out, _ = call("generate", "--model", folder, "--prompt", PROMPT, "--json", "-", "--ratio", 0, *options)
        values = json.loads(out)
        assert values["dense"]["text"] == values["pruned"]["text"], "both start from the seed"
        return values["dense"]["text"]

    first = texts("--temperature", 1.5, "--seed", 1)
    assert texts("--temperature", 1.5, "--seed", 1) == first
    assert len({first, texts("--temperature", 1.5, "--seed", 2), texts()}) == 3


def test_chat_template_and_no_chat(call, tmp_path, capsys):
    template = "{% for m in messages %}w3 w4 {{ m['content'] }} w6 {% endfor %}"
    folder = save(tmp_path / "chat", template=template)
    capsys.readouterr()
    options = ("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 2, "--json", "-")
    assert json.loads(call(*options)[1])["report"]["prompt_tokens"] == 8
    assert json.loads(call(*options, "--no-chat")[1])["report"]["prompt_tokens"] == 5


def test_one_token_has_no_decode_speed(call, folder):
    code, out, err = call("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 1, "--json", "-")
    values = json.loads(out)
    assert code == 0
    assert values["dense"]["decode_tokens_per_s"] is None
    assert values["pruned"]["decode_tokens_per_s"] is None
    assert "too short to time" in err


def test_process_keeps_stdout_clean(folder):
    script = "from pop_mm.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", "--model", folder, "--prompt", PROMPT, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "default"})
    assert done.returncode == 0
    assert set(json.loads(done.stdout)) == {"model", "weight_format", "prompt", "config", "dense", "pruned", "report"}
    for noise in ("Warning", "Loading weights", "it/s", "generation flags"):
        assert noise not in done.stderr


# inspect ------------------------------------------------------------------------------------------------------------


def test_inspect_json(call, folder):
    code, out, err = call("inspect", "--model", folder, "--ratio", 0.4, "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [row["name"] for row in rows] == [f"model.layers.{i}.mlp" for i in range(3)]
    for row in rows:
        assert set(row) == INSPECT_KEYS
        assert row["retained"] + row["candidates"] + row["pruned"] == row["size"] == 64
        assert row["backend"] == "inplace"
        assert row["bytes_per_token_dense"] == 4 * 3 * 64 * 32
        assert row["bytes_per_token_pruned"] == 4 * 3 * (row["retained"] + row["candidates"]) * 32


def test_inspect_plans_what_a_session_does(call, folder):
    options = ("--model", folder, "--ratio", 0.3, "--gamma", 0.2)
    planned = json.loads(call("inspect", *options, "--json")[1])
    done = json.loads(call("generate", *options, "--prompt", PROMPT, "--json", "-")[1])["report"]["ffns"]
    shared = INSPECT_KEYS - {"bytes_per_token_dense", "bytes_per_token_pruned", "weight_format"}
    assert [{k: row[k] for k in shared} for row in planned] == [{k: row[k] for k in shared} for row in done]


def test_inspect_needs_no_weights(call, folder, tmp_path):
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    code, out, _ = call("inspect", "--model", tmp_path, "--ratio", 0.4)
    assert code == 0
    attention, ffn, head = 4 * 3 * 3072, 4 * 3 * 6144, 4 * 96 * 32
    largest = ffn / (attention + ffn)
    assert "below 0.666" in out, "rounded down"
    words = " ".join(out.split())
    assert "3 FFNs of gate_proj, up_proj, down_proj, found by LlamaAdapter" in words
    assert f"leaves out {0.4 / largest:.1%} of each FFN" in words
    kept = 64 - int(0.4 / largest * 64)
    pruned = ffn * (kept + round(0.1 * 64 / 2)) / 64
    assert f"total {(attention + ffn + head) / 1000:.1f} kB {(attention + pruned + head) / 1000:.1f} kB" in words
    assert f"{(attention + ffn + head) / (attention + pruned + head):.2f}x" in words
    row = next(line.split() for line in out.splitlines() if "inplace" in line)
    assert row[:2] == ["0-2", "64"]


def test_inspect_of_a_masked_and_of_a_quantised_model(call, folder, tmp_path):
    rows = json.loads(call("inspect", "--model", folder, "--backend", "masked", "--json")[1])
    assert all(row["bytes_per_token_pruned"] == row["bytes_per_token_dense"] for row in rows)
    config = json.loads((Path(folder) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = call("inspect", "--model", tmp_path)
    assert code == 0
    assert "the checkpoint is quantised (gptq)" in out


def test_inspect_counts_packed_weights_by_their_bytes(call, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    config = json.loads((Path(folder) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = json.loads(call("inspect", "--model", tmp_path, "--ratio", 0.2, "--json")[1])
    assert {row["bytes_per_token_dense"] for row in rows} == {3 * 64 * 32 / 2}, "without files: what the config says"

    tensors = {}
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        prefix = name.removesuffix(".weight")
        if "mlp" in name or "self_attn" in name:
            tensors[f"{prefix}.qweight"] = torch.zeros(tensor.numel() // 8, dtype=torch.int32)
            tensors[f"{prefix}.scales"] = torch.zeros(tensor.numel() // 32, dtype=torch.float16)
            tensors[f"{prefix}.bias"] = torch.zeros(7)
        else:
            tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    rows = json.loads(call("inspect", "--model", tmp_path, "--ratio", 0.2, "--json")[1])
    whole = 3 * 64 * 32
    assert {row["bytes_per_token_dense"] for row in rows} == {whole // 2 + whole // 16}
    assert {row["bytes_per_token_pruned"] for row in rows} == {whole // 2 + whole // 16}
    for amount in ("--ratio", 0.2), ():
        words = call("inspect", "--model", tmp_path, *amount)[1].split()
        assert words[words.index("attention") + 1] == f"{3 * 3072 * (1 / 2 + 1 / 16) / 1000:.1f}"
        assert words[words.index("lm_head") + 1] == f"{4 * 96 * 32 / 1000:.1f}"
    rows = json.loads(call("inspect", "--model", tmp_path, "--json")[1])
    assert {row["bytes_per_token_dense"] for row in rows if row["role"] == "dense"} == {whole // 2 + whole // 16}


def test_inspect_of_an_unregistered_model_type_probes_its_structure(call, folder, monkeypatch):
    from pop_mm.adapters import registry

    monkeypatch.delitem(registry._ADAPTERS, "llama")
    code, out, _ = call("inspect", "--model", folder)
    assert code == 0
    assert "found by StructuralAdapter" in " ".join(out.split())


# adapters and models ------------------------------------------------------------------------------------------------


def test_adapters(call):
    code, out, err = call("adapters", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert rows == support_table()
    assert all(set(row) == {"model_type", "adapter", "kind", "layout"} for row in rows)
    code, out, _ = call("adapters")
    assert code == 0
    assert "LlamaAdapter" in out


def test_the_docs_have_the_support_table(call):
    _, out, _ = call("adapters", "--markdown")
    for row in support_table():
        assert f"`{row['model_type']}`" in out
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- adapters:begin -->\n(.*?)<!-- adapters:end -->", page, re.DOTALL)
    assert match, "docs/support.md has no <!-- adapters:begin --> ... <!-- adapters:end -->"
    assert match[1].strip() == out.strip(), "paste the output of `pop-mm adapters --markdown` into docs/support.md"


def test_models(call, tmp_path, monkeypatch):
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path))
    code, out, _ = call("models", "list")
    assert code == 0
    assert "smollm2-135m" in out
    assert str(tmp_path) in out
    monkeypatch.setattr("pop_mm.samples.fetch", lambda name: tmp_path / name)
    assert call("models", "fetch", "smollm2-135m") == (0, f"{tmp_path / 'smollm2-135m'}\n", "")


def test_version_and_help(call):
    assert call("--version") == (0, f"{pop_mm.__version__}\n", "")
    code, out, _ = call("--help")
    assert code == 0
    assert all(command in out for command in ("generate", "inspect", "adapters", "models"))


def test_documentation_names_every_key(call, folder):
    document = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    documented = {part for name in re.findall(r"`([a-z_.]+)`", document) for part in name.split(".")}

    def keys(value):
        if isinstance(value, dict):
            yield from (key for key in value if key not in ("inplace", "masked"))
            for item in value.values():
                yield from keys(item)
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    for command in (
        ("generate", "--model", folder, "--prompt", PROMPT, "--json", "-"),
        ("inspect", "--model", folder, "--json"),
        ("adapters", "--json"),
    ):
        assert set(keys(json.loads(call(*command)[1]))) <= documented


# mistakes -----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no command": (["bogus"], "No such command 'bogus'"),
    "no model": (["generate", "--prompt", "w5"], "Missing option '--model'"),
    "no prompt": (["generate", "--model", "FOLDER"], "Give --prompt or --prompt-file"),
    "empty prompt": (["generate", "--model", "FOLDER", "--prompt", " "], "prompt is empty"),
    "unknown option": (["inspect", "--model", "FOLDER", "--bogus"], "No such option"),
    "ratio no number": (["inspect", "--model", "FOLDER", "--ratio", "abc"], "--ratio"),
    "ratio out of range": (["inspect", "--model", "FOLDER", "--ratio", "1"], "ratio must lie in [0, 1); got 1"),
    "ratio nan": (["inspect", "--model", "FOLDER", "--ratio", "nan"], "ratio must be a number"),
    "ratio too large": (["generate", "--model", "FOLDER", "--prompt", "w5", "--ratio", "0.9"], "must stay below 0.666"),
    "gamma": (["inspect", "--model", "FOLDER", "--gamma", "2"], "gamma must lie in [0, 1]"),
    "scope": (["inspect", "--model", "FOLDER", "--scope", "all"], "scope must be one of"),
    "backend": (["inspect", "--model", "FOLDER", "--backend", "fast"], "backend must be one of"),
    "prefill": (["generate", "--model", "FOLDER", "--prompt", "w5", "--prefill", "x"], "prefill must be one of"),
    "dtype": (["inspect", "--model", "FOLDER", "--dtype", "int3"], "dtype must be one of"),
    "device": (["generate", "--model", "FOLDER", "--prompt", "w5", "--device", "abacus"], "device 'abacus'"),
    "no tokens": (["generate", "--model", "FOLDER", "--prompt", "w5", "--max-new-tokens", "0"], "--max-new-tokens"),
    "context": (["generate", "--model", "LEARNED", "--prompt", "w5", "--max-new-tokens", "500"], "context is 128"),
    "temperature": (["generate", "--model", "FOLDER", "--prompt", "w5", "--temperature", "-1"], "--temperature"),
    "temperature too low": (
        ["generate", "--model", "NONE", "--prompt", "w5", "--temperature", "1e-45"],
        "take 0 (greedy)",
    ),
    "temperature too high": (
        ["generate", "--model", "NONE", "--prompt", "w5", "--temperature", "inf"],
        "--temperature",
    ),
    "seed": (["generate", "--model", "NONE", "--prompt", "w5", "--seed", str(2**63)], "--seed"),
    "prompt in another encoding": (["generate", "--model", "NONE", "--prompt", "w5 \udcff"], "not valid UTF-8"),
    "json folder": (["generate", "--model", "NONE", "--prompt", "w5", "--json", "TMP/no/a.json"], "a.json cannot be"),
    "json is a folder": (["generate", "--model", "NONE", "--prompt", "w5", "--json", "TMP"], "cannot be written"),
    "plot folder": (["generate", "--model", "NONE", "--prompt", "w5", "--plot", "TMP/no/a.png"], "there is no folder"),
    "plot suffix": (["generate", "--model", "NONE", "--prompt", "w5", "--plot", "TMP/a.jpg"], ".png, .svg, .pdf"),
    "model path": (["inspect", "--model", "TMP/nosuch"], "there is no such folder"),
    "model id": (["inspect", "--model", "no/such"], "hub cannot be reached"),
    "model id to load": (["generate", "--model", "no/such", "--prompt", "w5"], "hub cannot be reached"),
    "no config": (["inspect", "--model", "TMP"], "there is no config.json in it"),
    "nothing to load": (["generate", "--model", "TMP", "--prompt", "w5"], "there is no config.json in it"),
    "bad config": (["inspect", "--model", "BROKEN"], "not a valid JSON file"),
    "impossible config": (["inspect", "--model", "IMPOSSIBLE"], "cannot be built from its config"),
    "sample": (["inspect", "--model", "smollm2"], "did you mean smollm2-135m"),
    "fetch": (["models", "fetch", "smollm"], "There is no sample 'smollm'"),
    "json and markdown": (["adapters", "--json", "--markdown"], "not both"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_a_sentence_and_code_2(call, folder, tmp_path, mistake):
    arguments, message = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "impossible").mkdir()
    (tmp_path / "impossible" / "config.json").write_text('{"model_type": "llama", "intermediate_size": -4}')
    if "LEARNED" in arguments:
        save(tmp_path / "learned", "gpt2")
    places = {
        "LEARNED": str(tmp_path / "learned"),
        "IMPOSSIBLE": str(tmp_path / "impossible"),
        "FOLDER": folder,
        "NONE": "no/such",
        "BROKEN": str(tmp_path / "broken"),
    }
    arguments = [places.get(a, a.replace("TMP", str(tmp_path / "empty"))) for a in arguments]
    code, out, err = call(*arguments)
    assert (code, out) == (1 if message == "hub cannot be reached" else 2, ""), (
        "what the hub does not give is no mistake"
    )
    assert err.startswith("Error: ")
    assert err.count("\n") == 1, "one line"
    assert message in err
    assert "Traceback" not in err
    assert not list((tmp_path / "empty").iterdir())


def test_mistake_in_a_process_shows_no_traceback(folder):
    script = "from pop_mm.cli import main; main()"
    command = [sys.executable, "-c", script, "generate", "--model", folder, "--prompt", PROMPT, "--ratio", "0.9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"Error: .*\n", done.stderr)


@pytest.mark.parametrize("command", [["adapters"], ["inspect", "--model", "FOLDER", "--json"]])
def test_output_that_cannot_be_written_is_a_sentence(folder, command):
    script = "from pop_mm.cli import main; main()"
    command = [sys.executable, "-c", script, *(folder if a == "FOLDER" else a for a in command)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"Error: The output cannot be written: No space left on device\.\n", done.stderr)


def test_json_on_stdout_fits_any_encoding(capsys):
    write_json({"text": "caf\xe9"}, "-")
    out = capsys.readouterr().out
    assert out.isascii()
    assert json.loads(out) == {"text": "caf\xe9"}


def test_damaged_weights(call, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    code, out, err = call("generate", "--model", tmp_path / "copy", "--prompt", PROMPT)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"Error: The weights of .* could not be loaded: SafetensorError: .*damaged\.\n", err)


def test_model_that_cannot_be_pruned(call, tmp_path, capsys):
    folder = save(tmp_path / "bloom", "bloom", slow_but_exact=True, pretraining_tp=2)
    capsys.readouterr()
    code, _, err = call("generate", "--model", folder, "--prompt", PROMPT)
    assert code == 2
    assert err.startswith("Error: ")


def test_interrupt_is_quiet(call, folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pop_mm.cli.generate, "answer", interrupted)
    assert call("generate", "--model", folder, "--prompt", PROMPT) == (130, "", "")


def test_settings_of_transformers_are_as_before(call, folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    call("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 2)
    call("inspect", "--model", "no/such")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_package_as_a_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pop_mm", "adapters", "--help"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("pop_mm", run_name="__main__")
    assert left.value.code == 0 and "pop-mm adapters" in capsys.readouterr().out
