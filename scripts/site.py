"""What mkdocs does not know by itself: the navigation, pages outside ``docs/``, and the command line's reference.

``mkdocs.yml`` names this file as a hook. Each function is called by mkdocs, and an error in one stops the build.
"""

from __future__ import annotations

import html as entities
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
# File of the repository that pages link to -> its page on the site
OUTSIDE = {
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "notebooks/README.md": "notebooks.md",
    "pop_mm/data/tiny_vlm/README.md": "tiny_vlm.md",
}
OUTSIDE |= {(path := f"notebooks/{file.name}"): path for file in ROOT.glob("notebooks/*.ipynb")}
CLI_MARK = "<!-- the site puts the reference here -->"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def navigation(index: str) -> list[dict[str, Any]]:
    """Read the navigation from the text of ``docs/index.md``: ``## Section`` and ``- [Title](page.md): ...``."""
    sections: list[dict[str, Any]] = []
    for line in index.splitlines():
        if heading := re.match(r"## (.+)", line):
            sections.append({heading[1]: []})
        elif entry := re.match(r"- \[(.+?)\]\((\S+?)\): ", line):
            pages = next(iter(sections[-1].values()))
            pages.append({entry[1]: site_link(entry[2], "docs/index.md")})
    return [{"Home": "index.md"}, *(section for section in sections if any(section.values()))]


def site_link(target: str, source: str) -> str:
    """Return where a relative link of ``source`` (path in the repository) leads on the site."""
    path = os.path.normpath(os.path.join(os.path.dirname(source), target)).replace(os.sep, "/")
    if path in OUTSIDE:
        return OUTSIDE[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else target


def on_startup(**_: Any) -> None:
    """Lay the package out as it is installed, where mkdocstrings looks: it leaves out a folder that is not there yet."""
    package = ROOT / "build" / "site" / "pop_mm"
    shutil.rmtree(package, ignore_errors=True)
    for source, target in (("pop_mm", package), ("adapters", package / "adapters")):
        for path in (ROOT / source).rglob("*.py"):
            copy = target / path.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def on_config(config: Any) -> Any:
    """Take the navigation from the index."""
    config.nav = navigation((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that lie outside ``docs/``."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links across ``docs/`` and the rest of the repository to pages of the site; add the commands' options."""
    source = {page: path for path, page in OUTSIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    markdown = _LINK.sub(lambda link: site_link(link[1], source), markdown)
    return markdown.replace(CLI_MARK, command_reference()) if CLI_MARK in markdown else markdown


def command_reference() -> str:
    """Return every command and option, as typer writes them, two headings lower."""
    command = [sys.executable, "-m", "typer", "pop_mm.cli", "utils", "docs", "--name", "pop-mm"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = entities.unescape(done.stdout.split("**Commands**:")[1])
    text = re.sub(r"\x08\n(Examples?:)\n((?:  .*\n)+)", r"\1\n\n```\n\2```\n", text)  # \b keeps click from wrapping it
    return re.sub(r"^(#+) ", r"#\1 ", text[text.index("## ") :], flags=re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of reStructuredText that docstrings have: ``:class:`Session```."""
    return re.sub(r":(?:class|meth|func|attr|mod|data):(?=<code>)", "", html)
