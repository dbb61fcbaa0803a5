"""A prompt goes through the code as docs/design.md says: the same modules, in the same order, and six at most."""

import re
import sys
from pathlib import Path

import pytest

import pop_mm
from helpers.observe import prompt
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs, tiny_vlm

PAGE = (Path(__file__).parents[1] / "docs" / "design.md").read_text(encoding="utf-8")
PACKAGE = Path(pop_mm.__file__).parent
POP, THRESHOLDS = {"ratio": 0.4}, {"budget": 0.6}
SESSION = [("session/session.py", "prune"), ("session/planning.py", "plan_ffns"), ("tracking/phase.py", "_before")]
BY_BUDGET = [
    ("session/session.py", "prune"),
    ("session/threshold_session.py", "plan_thresholds"),
    ("tracking/phase.py", "_before"),
]
CHANNELS, BOUNDS = ("decoding/channel_engine.py", "partition_all"), ("decoding/threshold_engine.py", "partition_all")
EXPERTS, FFN = ("executors/experts.py", "forward"), ("executors/narrow_ffn.py", "forward")
# what decodes -> model type, settings, and where the prompt is in each module
WAYS = {
    "POP": ("llama", POP, [*SESSION, CHANNELS, ("executors/narrow.py", "place"), FFN]),
    "POP, masked": (
        "llama",
        {**POP, "backend": "masked"},
        [
            *SESSION,
            ("executors/masked.py", "masked"),
            ("decoding/channel_engine.py", "choose"),
            ("ops/select.py", "choose"),
        ],
    ),
    "POP, an expert": ("mixtral", POP, [*SESSION, CHANNELS, EXPERTS, ("executors/narrow_experts.py", "__call__")]),
    "POP, a picture and a text": ("qwen2_vl", POP, [*SESSION, ("modality.py", "positions_of"), CHANNELS, FFN]),
    "thresholds": (
        "llama",
        THRESHOLDS,
        [*BY_BUDGET, BOUNDS, ("executors/rows.py", "begin"), ("accel/whole.py", "__call__")],
    ),
    "thresholds, an expert": (
        "mixtral",
        THRESHOLDS,
        [*BY_BUDGET, BOUNDS, EXPERTS, ("executors/rows_experts.py", "__call__")],
    ),
}


def calls(run):
    """Module and function of every call of the package's, in order."""
    found = []

    def note(frame, event, _):
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(f"{PACKAGE}/"):
            found.append((path[len(f"{PACKAGE}/") :], frame.f_code.co_name))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("what", WAYS)
def test_a_prompt_goes_the_way_that_the_page_says(what):
    model_type, settings, way = WAYS[what]
    if model_type == "qwen2_vl":
        model = tiny_vlm(model_type)
        inputs = image_inputs(model_type, model, images=1)
    else:
        model, inputs = tiny(model_type), {"input_ids": prompt()}

    def run():
        with pop_mm.prune(model, **settings):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)

    rest = iter(calls(run))
    assert [place for place in way if place not in rest] == []  # each is found behind the one before it
    assert len(way) <= 6


def test_the_page_names_these_ways():
    rows = re.findall(r"^\| ([^|`]+) \| ((?:`[\w/]+\.py`(?:, )?)+) \|$", PAGE, re.MULTILINE)
    named = {what: re.findall(r"`([\w/]+\.py)`", modules) for what, modules in rows}
    assert named == {what: [module for module, _ in way] for what, (_, _, way) in WAYS.items()}
