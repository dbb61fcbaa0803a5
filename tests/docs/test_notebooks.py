"""Every notebook runs from top to bottom in a fresh kernel, on stand-ins for the samples, and is kept without outputs."""

import pytest

from helpers.pages import ROOT

nbformat = pytest.importorskip("nbformat", reason="pip install 'pop_mm[notebooks]'")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def source(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, away, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = source(path)
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.execute(cwd=str(away))  # an exception in a cell is an error here
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_short_and_without_outputs(path):
    code = [cell for cell in source(path).cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert path.stat().st_size < 12_000
    nbformat.validate(source(path))


def test_the_docs_name_every_notebook():
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"]({path.name})" not in readme] == []
