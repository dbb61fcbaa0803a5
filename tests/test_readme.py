"""README and docs: every command line parses, README stays short, and the demo runs. Examples: ``test_docs.py``."""

import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from helpers.pages import PAGES, README, ROOT, TEMPLATE, blocks
from helpers.tiny_folder import save
from pop_mm.cli import app


def name_of(page):
    return page.relative_to(ROOT).as_posix()


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


def test_examples_name_a_model_of_the_hub():
    codes = [block.text for block in blocks("python", pages=[README])]
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
