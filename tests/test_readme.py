"""README and docs: every example runs, every command line parses, every link leads somewhere, and README stays short."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pop_mm.cli import app
from tiny_folder import save

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").glob("*.md")])
# Sample in an example -> type of the tiny model that takes its place here. tiny-vlm is small, ships, and runs as it is.
STAND_INS = {"smollm2-135m": "llama", "smollm2-mixtral": "mixtral"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    """The fenced blocks of a language, with the number of each one's first line."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n") + 1, match[1]) for match in found]


def python_blocks():
    pages = [README, ROOT / "docs" / "moe.md", ROOT / "docs" / "vlm.md"]  # the other pages show parts of programs
    for page in pages:
        for line, code in blocks(page, "python"):
            yield pytest.param(page, line, code, id=f"{name_of(page)}:{line}")


def commands(page):
    """Every command line of pop-mm that stands on a line of its own in a block; a backslash goes on with the next line."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^(?: {4})?(pop-mm (?:[^\n]*\\\n)*[^\n]*)", text, re.MULTILINE):
        yield text[: match.start()].count("\n") + 1, match[1].replace("\\\n", " ")


def command_lines():
    for page in PAGES:
        for number, line in commands(page):
            yield pytest.param(line, id=f"{name_of(page)}:{number}")


def mentions():
    """Every mention of pop-mm within a text: ``pop-mm inspect --check``."""
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for text in re.findall(r"`(pop-mm [^`]+)`", line):
                yield pytest.param(text, id=f"{name_of(page)}:{number}:{text[:30]}")


def leaf(words):
    """The command that the words name, and the rest of them."""
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def options(command):
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)} | {"--help"}


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """``load`` of a sample gives a tiny model; returns the names that were asked for."""
    asked = []

    def load(name):
        asked.append(name)
        folder = tmp_path / name
        save(folder, STAND_INS[name], TEMPLATE)
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    monkeypatch.setattr("pop_mm.samples.load", load)
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(("page", "line", "code"), python_blocks())
def test_examples_run(page, line, code, stand_ins, capsys):
    exec(compile("\n" * (line - 1) + code, page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
    if "smollm2" in code:
        assert stand_ins == re.findall(r'load\("([^"]+)"\)', code)


def test_the_picture_example_answers_right(stand_ins, capsys):
    (code,) = [code for _, code in blocks(README, "python") if "load_vision" in code]
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert re.search(r"\b(two|2)\b", capsys.readouterr().out, re.IGNORECASE)


def test_examples_name_a_model_of_the_hub():
    codes = [code for _, code in blocks(README, "python")]
    named = [re.findall(r'# .*"([\w.-]+/[\w.-]+)"', code) for code in codes]
    assert len(codes) == 3
    assert [bool(found) for found in named] == [False, True, True]
    assert "AutoModelForCausalLM" in codes[0]


@pytest.mark.parametrize("line", command_lines())
def test_command_lines_parse(line):
    command, rest = leaf(shlex.split(line, comments=True)[1:])
    command.make_context("pop-mm", list(rest))  # an unknown option, a missing one or a wrong value is an error


@pytest.mark.parametrize("text", mentions())
def test_mentioned_commands_exist(text):
    words = re.sub(r"[\[\]]", " ", text).split()[1:]
    command, rest = leaf(words)
    named = {word.split("=")[0].strip(",.;") for word in rest if word.startswith("--")}
    assert rest != words or words[0].startswith("--") or words[0] == "COMMAND", f"no command {words[0]!r}"
    if words[0] != "COMMAND":
        assert named <= options(command)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"\w+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []
    scripts = re.findall(r"python ((?:demos|benchmarks|tests)/[\w/]+\.py)", text)
    assert [script for script in scripts if not (ROOT / script).exists()] == []


def test_the_index_lists_every_page_once():
    """``make docs`` takes the navigation of the site from there (scripts/site.py)."""
    index = ROOT / "docs" / "index.md"
    listed = re.findall(r"^- \[[^\]]+\]\((\S+)\): .+", index.read_text(encoding="utf-8"), re.MULTILINE)
    outside = [target for target in listed if target.startswith("../")]
    assert sorted(set(listed) - set(outside)) == [page.name for page in PAGES if page not in (README, index)]
    assert len(listed) == len(set(listed))


def test_readme_is_short_and_narrow():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_the_demo_fits_and_says_which_method_to_use(tmp_path):
    model = save(tmp_path / "model", "llama", TEMPLATE)
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "140"}
    command = [sys.executable, ROOT / "demos" / "generate_text.py", "--model", model, "--budget", "0.8"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    rows = {cells[0]: cells[1:] for line in lines if (cells := line.split()) and "%" in line and "x" in line}
    assert [rows[name][0] for name in ("dense", "thresholds", "pop")] == ["100%", "80%", "80%"]
    same = {name: int(rows[name][-1].strip("%")) for name in ("thresholds", "pop")}
    advised = re.search(r"method='(\w+)'", " ".join(done.stdout.split()))[1]
    assert same[advised] == max(same.values())
