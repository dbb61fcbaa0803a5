"""Every command line in a ``bash`` block of README and docs runs, on stand-ins for the samples (``make test-docs``)."""

import importlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from helpers.pages import ROOT, asked_server, blocks, commands, run_python

BASH = [block for block in blocks("bash") if not block.not_run and block.server is None]
# A line that several pages have runs once.
LINES = {
    " ".join(shlex.split(line, comments=True)): pytest.param(line, id=f"{block}:{number}")
    for block in reversed(BASH)
    for number, line in enumerate(commands(block.code))
}


@pytest.mark.parametrize("line", LINES.values())
def test_command_lines_run(line, away, call, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # a chat ends at once
    program, *words = shlex.split(line, comments=True)
    if (program, words[0]) == ("pop-mm", "app"):
        pytest.skip("a server does not end; test_app.py and test_app_browser.py start it")
    if (program, words[0]) == ("pop-mm", "serve"):
        pytest.importorskip("openai", reason="the extra [serve]")
        started = [sys.executable, "-m", "pop_mm", *words, "--port", "0"]
        process = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert "answers at http://127.0.0.1:" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert (*process.communicate(timeout=60), process.returncode) == ("", "", 130)
    elif program == "pop-mm":
        code, printed, errors = call(*words)
        assert code == 0, errors
        assert printed.strip() or errors.strip()
    elif program == "python" and words[0] == "-m":
        importlib.import_module(words[1]).main(words[2:])
        assert capsys.readouterr().out.strip()
    else:
        assert program == "python", f"a block of {line!r} needs <!-- not run: why -->"
        command = [sys.executable, ROOT / words[0], *words[1:]]
        done = subprocess.run(
            command, env={**os.environ, "COLUMNS": "120"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


@pytest.mark.parametrize("block", [block for block in blocks("bash") if block.server is not None], ids=str)
def test_lines_that_ask_a_server_run(block, away):
    pytest.importorskip("openai", reason="the extra [serve]")
    if shutil.which("curl") is None:
        pytest.skip("there is no curl")
    with asked_server(block) as code:
        for line in commands(code):
            command = ["bash", "-c", f"{line} --fail --noproxy '*'"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip()


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.slow], ids=str)
def test_slow_python_blocks_run(block, away):
    run_python(block)
