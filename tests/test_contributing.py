"""What CONTRIBUTING.md and AGENTS.md name exists, and the version is the same wherever it stands."""

import re
from pathlib import Path

import pytest

import pop_mm

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "AGENTS.md")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page):
    text = read(page)
    named = re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|md|toml|txt|yml))`", text)
    named += [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in target]
    siblings = ("", "tests/")  # files of tests are also named in brackets behind one of them
    missing = [name for name in named if not any((ROOT / folder / name).exists() for folder in siblings)]
    assert named
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[1].split())
    lines = re.findall(r"(?:^ {4}|`)make ([a-z\- ]+?)(?:  |`|$)", read(page), re.MULTILINE)
    named = {target for line in lines for target in line.split()}
    assert named
    assert named <= targets


@pytest.mark.parametrize("name", ["Projection.effective_norms"])
def test_what_the_recipes_name_is_there(name):
    from pop_mm.weights import layout

    assert name in read("CONTRIBUTING.md")
    owner, attribute = name.split(".")
    assert hasattr(getattr(layout, owner), attribute)


def test_the_version_is_one():
    found = [re.search(pattern, read(name), re.MULTILINE)[1] for name, pattern in (
        ("pyproject.toml", r'^version = "(.+)"'),
        ("CITATION.cff", r"^version: (.+)"),
        ("CHANGELOG.md", r"^## (\S+) \(\d{4}-\d\d-\d\d\)"),
    )]  # fmt: skip
    assert found == [pop_mm.__version__] * 3
