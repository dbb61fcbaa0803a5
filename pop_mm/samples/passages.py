"""Public-domain English prose that ships with pop_mm, for examples, tests and benchmarks."""

from __future__ import annotations

from importlib.resources import files


def load_passages() -> dict[str, str]:
    """Read every passage of ``data/passages`` (sources: the README there).

    Returns
    -------
    dict[str, str]
        Passage name (file name without ``.txt``, sorted) -> text, paragraphs separated by an empty line.
    """
    found = [item for item in files("pop_mm").joinpath("data", "passages").iterdir() if item.name.endswith(".txt")]
    return {item.name[:-4]: item.read_text(encoding="utf-8").strip() for item in sorted(found, key=lambda f: f.name)}
