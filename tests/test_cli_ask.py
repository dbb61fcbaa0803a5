"""``pop-mm ask`` and its picture."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pop_mm
from helpers.tiny_folder import save
from helpers.tiny_vlm_folder import save_vlm
from pop_mm.report.plotting import PlotError
from pop_mm.report.plotting_answer import plot_answer
from pop_mm.samples import SampleError, load, load_vision
from pop_mm.vision import decode, prepare

QUESTION = "What is in the picture?"
ANSWER_KEYS = {"text", "decode_tokens_per_s"}


pytestmark = pytest.mark.usefixtures("wide_terminal_and_no_network")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_vlm(tmp_path_factory.mktemp("models") / "vlm", num_hidden_layers=3)


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_ask_with_nothing_pruned_draws_too(call, folder, picture, tmp_path):
    code, _, err = call(
        *("ask", QUESTION, "--model", folder, "--image", picture, "--ratio", 0, "--max-new-tokens", 4),
        *("--plot", tmp_path / "a.png"),
    )
    assert (code, err) == (0, "")
    assert (tmp_path / "a.png").exists()


def test_ask(call, folder, picture, tmp_path):
    code, out, err = call(
        *("ask", QUESTION, "--model", folder, "--image", picture, "--ratio", 0.3, "--max-new-tokens", 8),
        *("--json", tmp_path / "a.json", "--plot", tmp_path / "a.png"),
    )
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values.keys() == {
        "model",
        "weight_format",
        "image",
        "question",
        "tokens",
        "config",
        "dense",
        "pruned",
        "report",
    }
    assert values["dense"].keys() == values["pruned"].keys() == ANSWER_KEYS
    assert (values["image"], values["question"]) == ([str(picture)], QUESTION)
    counts = {name: count for name, count in values["tokens"].items() if count}
    assert set(counts) == {"text", "image"}
    assert values["report"]["modality_tokens"] == counts
    assert all(set(ffn["modality_overlap"]) == {"text", "image"} for ffn in values["report"]["ffns"])
    assert f"{sum(counts.values())} prompt tokens" in out
    assert "kept for the answer, each kind of token alone would have kept: text " in " ".join(out.split())
    assert "dense" in out and "pruned, ratio 0.3" in out
    with Image.open(tmp_path / "a.png") as saved:
        assert min(saved.size) > 400

    model, processor = load_vision(folder)  # the same by hand
    inputs = prepare(processor, picture, QUESTION, model=model)
    settings = {"do_sample": False, "num_beams": 1, "max_new_tokens": 8}
    assert decode(processor, model.generate(**inputs, **settings), inputs)[0] == values["dense"]["text"]
    with pop_mm.prune(model, ratio=0.3):
        assert decode(processor, model.generate(**inputs, **settings), inputs)[0] == values["pruned"]["text"]


def test_several_images(call, folder, picture, tmp_path):
    other = tmp_path / "other.jpg"
    Image.new("RGB", (90, 30), "red").save(other)
    one, both = tmp_path / "one.json", tmp_path / "both.json"
    for file, images in (one, [picture]), (both, [picture, other]):
        options = [option for image in images for option in ("--image", image)]
        code, _, err = call("ask", QUESTION, "--model", folder, *options, "--max-new-tokens", 2, "--json", file)
        assert (code, err) == (0, "")
    counts = [json.loads(file.read_text())["tokens"]["image"] for file in (one, both)]
    assert counts[1] > counts[0] > 0


def test_json_on_stdout_is_nothing_else(call, folder, picture):
    code, out, err = call("ask", QUESTION, "--model", folder, "--image", picture, "--max-new-tokens", 2, "--json", "-")
    assert code == 0
    assert json.loads(out)["question"] == QUESTION
    assert "dense" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--image": "nowhere.png"}, "nowhere.png"),
        ({"question": "  "}, "The question is empty"),
        ({"--temperature": "1e-40"}, "too near 0 to sample"),
        ({"question": "\udce9"}, "not valid UTF-8"),
        ({"--ratio": "1.5"}, "ratio must lie in [0, 1)"),
        ({"--plot": "a.gif"}, ".png, .svg, .pdf"),
        ({"--device": "nowhere"}, "The device 'nowhere' cannot be used"),
        ({"--json": "/no/such/folder/a.json"}, "cannot be written"),
    ],
)
def test_bad_input_is_one_plain_sentence(call, folder, picture, change, message):
    options = {"--model": folder, "--image": str(picture), "--max-new-tokens": "2", **change}
    question = options.pop("question", QUESTION)
    code, out, err = call("ask", question, *[part for option in options.items() for part in option])
    assert code != 0 and out == ""
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_a_prompt_beyond_the_context_is_answered_with_a_warning(call, folder, picture):
    options = ("--model", folder, "--image", picture, "--max-new-tokens", 500)
    code, out, err = call("ask", QUESTION, *options)
    assert code == 0 and "pruned" in out
    assert re.search(
        r"Warning: .*\(images included\) and --max-new-tokens asks for 500 more, but .* context is 512", err
    )


def test_a_text_model_is_named_as_such(call, picture, tmp_path):
    text = save(tmp_path / "llama", num_hidden_layers=1)
    code, _, err = call("ask", QUESTION, "--model", text, "--image", picture)
    assert code != 0
    assert "is a llama, which takes no images" in " ".join(err.split())
    with pytest.raises(SampleError, match="takes no images"):
        load_vision(text)


def test_a_vision_model_can_be_asked_without_images(call, folder):
    model, _ = load(folder)
    assert model.config.model_type == "qwen3_vl"
    code, out, _ = call("generate", "--model", folder, "--prompt", "Hello there", "--max-new-tokens", 4)
    assert code == 0 and "pruned" in out
    code, out, _ = call("inspect", "--model", folder, "--json")
    assert code == 0
    assert all(row["name"].startswith("model.language_model.layers.") for row in json.loads(out))


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture(folder, picture, tmp_path, suffix):
    model, processor = load_vision(folder)
    answers = {"dense": {"text": "a $5 note " * 60, "decode_tokens_per_s": None}}
    with pop_mm.prune(model, ratio=0.3) as session:
        with pytest.raises(PlotError, match="nothing to draw yet"):
            plot_answer(session.report, [], QUESTION, answers, tmp_path / f"a.{suffix}")
        model.generate(**prepare(processor, picture, QUESTION, model=model), max_new_tokens=2)
        images = [Image.open(picture)] * 6
        saved = plot_answer(session.report, images, QUESTION, answers, tmp_path / f"a.{suffix}")
        assert saved.stat().st_size > 5000
        model.generate(**prepare(processor, None, "Hello", model=model), max_new_tokens=2)
        assert plot_answer(session.report, [], "Hello", answers, tmp_path / f"b.{suffix}").exists()
