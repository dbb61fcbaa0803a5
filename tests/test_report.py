import json
import struct
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

import pop_mm
from helpers.modes import config_of
from helpers.tiny_models import tiny
from pop_mm.report.footprint import Footprint
from pop_mm.report.plotting import PlotError
from pop_mm.report.tables import adapter_rows, adapters_markdown, byte_size, footprint_table, report_table

PROMPT = torch.arange(5, 17).unsqueeze(0)


def run(model, steps=6, rows=1, **settings):
    session = pop_mm.prune(model, config_of(**{"ratio": 0.4, **settings}))
    ids = PROMPT.repeat(rows, 1) + torch.arange(rows).unsqueeze(1)
    with session:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps + 1, do_sample=False)
    return session.report


@pytest.fixture(scope="module")
def report():
    return run(tiny("llama", num_hidden_layers=3))


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def rendered(renderables, width=120):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as capture:
        for renderable in renderables:
            console.print(renderable)
    return capture.get()


def test_json_of_a_session(report):
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    assert values["prompt_tokens"] == PROMPT.shape[1]
    assert values["forwards"] == {"prefill": 1, "decode": 6, "decode_masked_not_resident": 0}
    assert sum(values["backends"].values()) == len(values["ffns"]) == 3
    for row in values["ffns"]:
        assert row["retained"] + row["candidates"] + row["pruned"] == row["size"]
        assert row["active_per_step"] == row["kept"]
        assert 0 <= row["candidate_stability"] <= 1


def test_report_before_any_prompt(tmp_path):
    report = pop_mm.prune(tiny("llama"), ratio=0.4).report
    values = json.loads(report.to_json())
    assert values["prompt_tokens"] == 0
    assert [row["active_per_step"] for row in values["ffns"]] == [None, None]
    assert "No prompt has been processed yet" in str(report)
    assert "0-1" in str(report), "two equal rows are one"
    with pytest.raises(PlotError, match="run a prompt in the session first"):
        report.plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_printed_report_has_a_row_per_layer(report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # where all columns fit
    lines = str(report).splitlines()
    rows = [line.split() for line in lines if line.strip()[:1].isdigit() and "inplace" in line]
    sizes = report.ffns[0].plan.sizes
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for row, ffn in zip(rows, report.ffns, strict=True):
        wanted = [sizes.channels, sizes.retained, sizes.candidates, sizes.pruned, sizes.kept]
        assert row[1:6] == [str(number) for number in wanted]
        assert row[6] == f"{ffn.stability:.0%}"
    assert "40% of attention and FFN" in lines[0]
    assert "12 prompt tokens" in str(report)


def test_notes_are_printed():
    report = run(tiny("llama"), backend="masked", gamma=1.0)
    assert report.notes
    printed = " ".join(str(report).split())
    for note in report.notes:
        assert " ".join(note.split()) in printed


def test_table_of_very_many_ffns_is_summed_up(report):
    ffns = []
    for layer in range(200):
        plan = report.ffns[0].plan
        plan = replace(plan, ffn=replace(plan.ffn, layer=layer))
        ffns.append(replace(report.ffns[0], plan=plan, stability=layer / 200))
    rows = [line for line in rendered(report_table(replace(report, ffns=ffns))).splitlines() if "%" in line[20:]]
    assert [row.split()[0] for row in rows if "masked" in row or "inplace" in row][-1] == "0-199"
    assert "0% to 100%" in rows[-1]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_picture(report, tmp_path, suffix):
    before = dict(matplotlib.rcParams)
    path = report.plot(tmp_path / f"picture{suffix}")
    assert path == tmp_path / f"picture{suffix}"
    data = path.read_bytes()
    if suffix == ".png":
        assert size_of_png(path) == (1650, 540)
    else:
        assert (b"<svg" in data[:1000]) if suffix == ".svg" else data.startswith(b"%PDF")
    assert dict(matplotlib.rcParams) == before


def test_picture_shows_every_part(report, tmp_path):
    image = matplotlib.image.imread(report.plot(tmp_path / "a.png"))[..., :3]
    for colour in ("#0072B2", "#E69F00", "#E4E4E4"):
        rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        count = int((torch.from_numpy(image.copy()) - rgb).abs().amax(-1).lt(0.01).sum())
        assert count > 2000, colour


@pytest.mark.parametrize("settings", [{}, dict(ratio=None, budget=0.7)], ids=["pop", "thresholds"])
def test_dark_picture_has_light_letters_and_the_same_colours(tmp_path, settings):
    report = run(tiny("llama"), **settings)
    light, dark = (
        matplotlib.image.imread(report.plot(tmp_path / f"{dark}.png", dark=dark))[..., :3] for dark in (False, True)
    )
    assert light.shape == dark.shape and light[0, 0].min() == 1.0 and dark[0, 0].max() < 0.15
    bright = (dark.min(-1) > 0.9).mean()
    assert 0.001 < bright < 0.1, "letters, and no white areas"
    for colour in ("#0072B2", "#E69F00") if not settings else ("#0072B2", "#009E73"):
        rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        counts = [(abs(image - rgb).max(-1) < 0.01).sum() for image in (light, dark)]
        assert counts[0] == pytest.approx(counts[1], rel=0.2) and counts[0] > 100, colour


@pytest.mark.parametrize(
    "settings",
    [
        dict(batch="per_sequence", rows=3),
        dict(ratio=0.0),
        dict(layer_ratios={0: 0.0}, scope="ffn"),
        dict(gamma=0.0),
        dict(method="full"),
        dict(method="static"),
        dict(steps=1),
        dict(steps=0, prefill="partition"),
    ],
    ids=str,
)
def test_report_and_picture_of_other_sessions(tmp_path, settings):
    report = run(tiny("llama"), **settings)
    assert size_of_png(report.plot(tmp_path / "a.png")) == (1650, 540)
    for row in json.loads(report.to_json())["ffns"]:
        active = None if row["backend"] == "dense" or not report.timings.decode_forwards else row["kept"]
        assert row["active_per_step"] == active
    assert "POP" in str(report)


def test_picture_of_wide_and_unequal_ffns(report, tmp_path):
    wide = run(tiny("llama", intermediate_size=1000))
    assert wide.plot(tmp_path / "wide.png").exists()
    mixed = replace(wide, ffns=[*wide.ffns, *report.ffns])
    assert mixed.plot(tmp_path / "mixed.png").exists()
    many = replace(report, ffns=[report.ffns[0]] * 200)
    assert size_of_png(many.plot(tmp_path / "many.png"))[1] == 540, "one line for the FFNs of a layer"


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.jpg", "suffixes .png, .svg, .pdf"), ("a", "suffixes"), ("nosuch/a.png", "there is no folder")],
)
def test_bad_picture_path(report, tmp_path, name, message):
    with pytest.raises(PlotError, match=message):
        report.plot(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(PlotError, match="cannot be saved"):
        report.plot(tmp_path / "folder.png")


def test_markdown_and_grouping_of_adapters():
    support = [
        {"model_type": "b", "adapter": "X", "kind": "dense", "layout": "up | down"},
        {"model_type": "c", "adapter": "Y", "kind": "moe", "layout": "experts"},
        {"model_type": "a", "adapter": "X", "kind": "dense", "layout": "up | down"},
    ]
    assert adapter_rows(support) == [("a, b", "dense", "up | down", "X"), ("c", "moe", "experts", "Y")]
    lines = adapters_markdown(support).splitlines()
    assert lines[2] == "| `a`, `b` | dense | up \\| down | `X` |"
    assert len(lines) == 4


def test_bytes():
    assert [byte_size(n) for n in (12, 1234, 5.5e8, 7e12)] == ["12 B", "1.2 kB", "550.0 MB", "7.0 TB"]
    assert "2.00x" in rendered(
        [footprint_table(Footprint({"FFN": 400, "attention": 200}, {"FFN": 100, "attention": 200}))]
    )
