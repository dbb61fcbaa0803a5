"""How sessions and reports show themselves: short, grouped, and as JSON and pandas."""

import json
import re
import sys

import pytest
from rich.console import Console

import pop_mm
from helpers.observe import prompt
from helpers.tiny_models import tiny
from pop_mm.errors import PopError
from pop_mm.report.shown import grouped
from pop_mm.report.tables import least_width

SETTINGS = [{"ratio": 0.4}, {"budget": 0.6}]


@pytest.fixture(scope="module", params=SETTINGS, ids=["pop", "thresholds"])
def session(request):
    model = tiny("llama", num_hidden_layers=3)
    with pop_mm.prune(model, **request.param) as session:
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
        yield session


def test_they_are_short(session):
    report = session.report
    assert repr(session).startswith(f"<{type(session).__name__}: LlamaForCausalLM, {session.config.label}, attached; ")
    assert len(repr(session)) < 400
    assert len(repr(report)) < 2000
    assert f"{report.prompt_tokens} prompt tokens, 3 decode steps" in repr(report)
    assert re.search(r"\d\d% of the weights read", repr(report))


def test_a_long_report_is_short_too(session):
    from dataclasses import replace

    report = replace(session.report, notes=["something that goes on and on " * 30] * 40)
    assert len(repr(report)) < 2000
    assert "and 37 more notes" in repr(report)


@pytest.mark.parametrize("what", ["session", "report"])
def test_notebooks_show_a_small_table(session, what):
    shown = session if what == "session" else session.report
    html = shown._repr_html_()
    assert html.count("<table>") == 1 and len(html) < 2000
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", html)][1:]
    assert len({tuple(row[1:]) for row in cells}) == len(cells), "equal rows share a line"
    if what == "report" and session.config.ratio is not None:
        assert cells == [["0-2", *cells[0][1:]]]


def test_rows_are_grouped():
    assert grouped([("0", "a"), ("1", "a"), ("2", "b"), ("3", "a")]) == [["0-1, 3", "a"], ["2", "b"]]
    assert grouped([("q, k, v", "a"), ("o", "a")]) == [["q, k, v, o", "a"]]


@pytest.mark.parametrize("what", ["session", "report"])
def test_json_is_returned_and_written(session, what, tmp_path):
    shown = session if what == "session" else session.report
    text = shown.to_json()
    assert json.loads(text) == json.loads(json.dumps(shown.to_dict()))
    assert shown.to_json(tmp_path / "a.json") == text
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == json.loads(text)


def test_pandas_has_a_row_for_each_part(session):
    pandas = pytest.importorskip("pandas")
    frame = session.report.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    rows = session.report.to_dict()["ffns" if session.config.ratio is not None else "inputs"]
    assert list(frame["name"]) == [row["name"] for row in rows]
    assert len(session.to_pandas()) == len(session.plans)


def test_a_missing_pandas_is_named(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(PopError, match="pip install pandas"):
        session.report.to_pandas()


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_a_printed_report_fits_the_terminal(session, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    lines = str(session.report).splitlines()
    assert max(map(len, lines)) <= int(columns)
    assert not any("\u2026" in line for line in lines)


@pytest.mark.parametrize("columns", range(40, 120))
def test_a_figure_keeps_its_unit(session, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(session.report).splitlines()
    assert [line for line in lines if re.match(r"(s|ms|B|kB|MB|GB|TB)\b", line)] == []


@pytest.mark.parametrize("settings", SETTINGS, ids=["pop", "thresholds"])
def test_words_of_a_mixtures_report_are_whole_at_80_columns(settings, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = tiny("mixtral")
    with pop_mm.prune(model, **settings) as session:
        model.generate(prompt(), max_new_tokens=4, do_sample=False)
        text = str(session.report)
    assert max(map(len, text.splitlines())) <= 80 and "\u2026" not in text
    assert "experts" in text


def test_the_least_width_is_that_of_whole_words():
    from rich.table import Table

    table = Table("a heading", "b")
    table.add_row("some words", "1")
    width = least_width(table)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    for word in ("heading", "words"):
        assert word in capture.get()
