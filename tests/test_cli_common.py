"""What every command has: help with an example, how much it says, prompts from stdin and files, errors of the hub."""

import io
import json
import re
import shlex
import sys
import warnings

import pytest
import typer

import pop_mm.cli.generate
from helpers.tiny_folder import save
from pop_mm.cli import app
from pop_mm.cli.examples import EXAMPLES
from pop_mm.cli.terminal import CommandError, words
from pop_mm.errors import PopWarning
from pop_mm.samples import HubError, SampleError, load_config

pytestmark = pytest.mark.usefixtures("wide_terminal_and_no_network")
PROMPT = "w5 w9 w40 w7 w22"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("models") / "llama")


def commands(group=None, path=()):
    """Path and command of each, groups too."""
    group = typer.main.get_command(app) if group is None else group
    yield pytest.param(path, group, id=" ".join(("pop-mm", *path)))
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield pytest.param((*path, name), command, id=" ".join((*path, name)))


@pytest.mark.parametrize(("path", "command"), commands())
def test_every_help_fits_and_ends_in_examples_on_lines_of_their_own(call, monkeypatch, path, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = call(*path, "--help")
    assert (code, err) == (0, "")
    assert call(*path, "-h") == (0, out, "")
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"\d{7}", out), "a limit that nobody asks for"
    own = getattr(command.callback, "__name__", None)
    examples = EXAMPLES[own if own in EXAMPLES else " ".join(path) or "pop-mm"]
    head = "Example:" if len(examples) == 1 else "Examples:"
    assert out.rstrip("\n").split(f"\n  {head}\n")[1].splitlines() == [f"    {line}" for line in examples]
    assert not re.search(r"pop-mm \w+ .*--", out.split(f"\n  {head}\n")[0]), "an example in a sentence would be wrapped"
    if not hasattr(command, "commands"):
        assert "-v, --verbose" in out and "-q, --quiet" in out


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_parse(name):
    for line in EXAMPLES[name]:
        words = shlex.split(line)
        words = words[words.index("pop-mm") + 1 :]
        command = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        if words != ["COMMAND", "-h"]:
            command.make_context("pop-mm", words)


def test_the_list_of_commands_has_no_broken_sentence(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call("-h")
    assert "..." not in out.split("Commands:")[1]
    assert "--install-completion" in out


def test_square_brackets_are_shown(call, monkeypatch, capsys):
    assert "Needs the extra [app]." in " ".join(call("app", "--help")[1].split())
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = call("app", "--model", "tiny-vlm")
    assert code == 2
    assert 'pip install "pop_mm[app]"' in err


def test_sample_names_are_completed():
    from pop_mm.cli.framework import sample_names

    assert sample_names("tiny-vlm") == ["tiny-vlm", "tiny-vlm-moe"]
    assert "smollm2-135m" in sample_names("")


# how much is said -----------------------------------------------------------------------------------------------------


def test_quiet_prints_the_answer_alone(call, folder, tmp_path):
    asked = ("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 4)
    code, out, err = call(*asked, "-q", "--json", tmp_path / "a.json")
    assert (code, err) == (0, "")
    assert out == json.loads((tmp_path / "a.json").read_text())["pruned"]["text"].strip() + "\n"
    assert call("-q", *asked) == (0, out, ""), "in front of the command too"
    assert "tokens/s" in call(*asked)[1], "it is forgotten after the command"


def test_own_warnings_show_once_and_others_not(call, folder, monkeypatch):
    original = pop_mm.cli.generate.compare

    def compare(*arguments):
        for _ in range(2):
            warnings.warn("take more", PopWarning, stacklevel=1)
            warnings.warn("of somebody else", UserWarning, stacklevel=1)
        return original(*arguments)

    monkeypatch.setattr(pop_mm.cli.generate, "compare", compare)
    asked = ("generate", "--model", folder, "--prompt", PROMPT, "--max-new-tokens", 2)
    assert call(*asked)[2] == "Warning: take more\n"
    assert call(*asked, "-q")[2] == ""


def test_verbose_shows_tracebacks(call, folder, monkeypatch):
    def fail(*_):
        raise IndexError("out of range")

    monkeypatch.setattr(pop_mm.cli.generate, "compare", fail)
    code, _, err = call("generate", "--model", folder, "--prompt", PROMPT, "-v")
    assert code == 1
    assert err.splitlines()[-1] == "Error: IndexError: out of range."
    assert "Traceback" in err and "in fail" in err


# prompts --------------------------------------------------------------------------------------------------------------


def test_prompts_come_from_stdin_and_files(call, folder, monkeypatch, tmp_path):
    asked = ("generate", "--model", folder, "--max-new-tokens", 3, "--json", "-")
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    texts = [json.loads(call(*asked, *given)[1]) for given in (("--prompt", PROMPT), ("--prompt", "-"))]
    texts.append(json.loads(call(*asked, "--prompt-file", tmp_path / "prompt.txt")[1]))
    assert {text["prompt"] for text in texts} == {PROMPT}
    assert len({text["pruned"]["text"] for text in texts}) == 1


@pytest.mark.parametrize("given", [(), ("--prompt", "w5", "--prompt-file", "x")])
def test_one_prompt_is_needed(call, given):
    code, _, err = call("generate", "--model", "no/such", *given)
    assert (code, err) == (2, "Error: Give --prompt or --prompt-file, and not both (--prompt - is stdin).\n")


def test_prompt_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(CommandError, match="latin is not valid UTF-8: save the file as UTF-8"):
        words("prompt", None, str(tmp_path / "latin"))
    with pytest.raises(CommandError, match="none cannot be read: No such file"):
        words("prompt", None, str(tmp_path / "none"))


# the hub --------------------------------------------------------------------------------------------------------------


def raising(error):
    def from_pretrained(*_, **__):
        raise error

    return from_pretrained


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("We couldn't connect to 'https://huggingface.co' to load the files", "the hub cannot be reached"),
        ("own/er is not a local folder and is not a valid model identifier listed on 'x'", "the hub has no such model"),
        ("You are trying to access a gated repo.\nMake sure to have access", "it is gated; ask for access at https://"),
    ],
)
def test_errors_of_the_hub_are_a_sentence_with_code_1(call, monkeypatch, said, wanted):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", raising(OSError(said)))
    code, out, err = call("inspect", "--model", "own/er")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("Error: The config of 'own/er' could not be loaded: ") and wanted in err


def test_an_error_of_a_folder_is_none_of_the_hub(monkeypatch, folder):
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", raising(OSError("cannot connect the dots")))
    with pytest.raises(SampleError, match="connect the dots") as caught:
        load_config(folder)
    assert not isinstance(caught.value, HubError)
