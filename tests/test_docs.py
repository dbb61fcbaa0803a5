"""README and docs: every Python block runs, every block says what it is, every relative link leads somewhere.

Command lines are run by ``tests/docs`` (``make test-docs``), and here they must parse (``test_readme.py``).
"""

import re

import pytest

from helpers.pages import DOCS, PAGES, README, ROOT, blocks, run_python

PYTHON = [block for block in blocks("python") if not (block.goes_on or block.not_run or block.slow)]


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block, away, monkeypatch):
    if block.server is not None or "engines.server" in block.text:
        pytest.importorskip("openai", reason="the extra [serve]")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    printed = run_python(block)
    assert printed.strip() or "print(" not in block.text


def test_the_picture_example_answers_right(away):
    (block,) = [block for block in blocks("python", pages=[README]) if "load_vision" in block.text]
    assert re.search(r"\b(two|2)\b", run_python(block), re.IGNORECASE)


def test_every_block_has_a_language_and_a_known_comment():
    known = r'not run: .+|goes on|slow|run with ".*" for ".+"|given model: \w+|given server: [\w-]+'
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert [fence for fence in fences[::2] if fence not in ("python", "bash", "text", "json")] == [], page
    for block in blocks("python", "bash", "text"):
        assert [comment for comment in block.comments if not re.fullmatch(known, comment)] == [], block
        assert block.code  # replacements are found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_stand_in_blocks(page):
    """An indented command line would be run by nobody."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^ {4}(?:pop-mm|python|pip|make|lmms-eval) .*", text, re.MULTILINE) == []


def test_the_index_lists_every_page_once():
    """``make docs`` takes the navigation of the site from there (scripts/site.py)."""
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^- \[[^\]]+\]\((\S+)\): .+", index.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(target for target in listed if not target.startswith("../")) == sorted(
        page.name for page in DOCS if page != index
    )
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in (link for link in links if not re.match(r"\w+:", link)):
        file, _, anchor = target.partition("#")
        found = (page.parent / file) if file else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
            }
    scripts = re.findall(r"python ((?:demos|benchmarks|tests)/[\w/]+\.py)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []
