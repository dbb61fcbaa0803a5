"""Code blocks of README and docs: how a page says what runs, and with which models.

A comment of its own line in front of a block says what a test cannot know:

- ``<!-- not run: why -->``: the block is only read. Command lines of pop-mm in it must still parse.
- ``<!-- run with "small" for "large" -->``: the test replaces ``large`` by ``small`` in the block.
- ``<!-- goes on -->``: a Python block that uses the names of the page's block before it.
- ``<!-- given model: lfm2 -->``: ``model`` is a tiny one of this type, ``inputs`` a prompt for it.
- ``<!-- given server: smollm2-135m -->``: a server with this sample answers where the block says 127.0.0.1:8000.
- ``<!-- slow -->``: `make test-docs` runs the block, `make test` does not.

Blocks have a language: ``python`` and ``bash`` run, ``text`` is what was printed, the others are read by nobody.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import tiny
from pop_mm import PopConfig
from pop_mm.app.examples import SCENES
from pop_mm.samples import SAMPLES

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, *DOCS]
# Sample in an example -> type of the tiny model that takes its place. tiny-vlm is small, ships, and runs as it is.
STAND_INS = {"smollm2-135m": "llama", "smollm2-mixtral": "mixtral"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_BLOCK = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line, its language, its text and the comments above it."""

    page: Path
    line: int
    language: str
    text: str
    comments: tuple[str, ...]

    @property
    def not_run(self) -> bool:
        return any(comment.startswith("not run: ") for comment in self.comments)

    @property
    def slow(self) -> bool:
        return "slow" in self.comments

    @property
    def goes_on(self) -> bool:
        return "goes on" in self.comments

    @property
    def code(self) -> str:
        """The text with the replacements that the page states."""
        text = self.text
        for comment in self.comments:
            if stated := re.fullmatch(r'run with "(.*)" for "(.+)"', comment):
                assert stated[2] in text, f"{self}: there is no {stated[2]!r} to replace"
                text = text.replace(stated[2], stated[1])
        return text

    @property
    def server(self) -> str | None:
        """The sample of the server that the block asks."""
        found = [re.fullmatch(r"given server: ([\w-]+)", comment) for comment in self.comments]
        return next((match[1] for match in found if match), None)

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


def blocks(*languages: str, pages: list[Path] = PAGES) -> Iterator[Block]:
    """Every block in one of the languages, page by page."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for found in _BLOCK.finditer(text):
            if found[2] in languages:
                line = text[: found.start(3)].count("\n") + 1
                yield Block(page, line, found[2], found[3], tuple(re.findall(r"<!-- (.*) -->", found[1])))


def commands(text: str) -> list[str]:
    """The command lines of a bash block; a backslash at the end goes on with the next line."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def stand_in_cache(cache: Path) -> None:
    """Make a cache of samples whose language models are tiny and random, with a vocabulary of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    for name, model_type in STAND_INS.items():
        plain = {"mlp_bias": False, "attention_bias": False} if model_type == "llama" else {}  # as the sample
        model = tiny(model_type, vocab_size=len(vocabulary), max_position_embeddings=4096, **plain)
        folder = cache / f"{name}-v{SAMPLES[name].revision}"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def working_folder(folder: Path) -> None:
    """Put what the pages name into a folder: a picture, a text, and settings."""
    shutil.copyfile(SCENES / "two-blue.png", folder / "photo.png")
    PopConfig(budget=0.7).save(folder / "settings.json")
    (folder / "mine.txt").write_text(
        "The lighthouse keeper climbed the stairs and lit the lamp. " * 20, encoding="utf-8"
    )
    (folder / "settings.json").write_text('{"budget": 0.65}', encoding="utf-8")


def run_python(block: Block) -> str:
    """Run a block and those that go on with it; returns what was printed."""
    names, printed = _given(block), io.StringIO()
    rest = [other for other in blocks("python", pages=[block.page]) if other.line > block.line]
    for part in [block, *rest]:
        if part is not block and not part.goes_on:
            break
        with redirect_stdout(printed), asked_server(part) as code:
            exec(compile("\n" * (part.line - 1) + code, str(part.page), "exec"), names)
    return printed.getvalue()


@contextmanager
def asked_server(block: Block) -> Iterator[str]:
    """The block's code, with the server that it asks running."""
    if block.server is None:
        yield block.code
        return
    from pop_mm.engines.server.run import ServedModel, serve

    with serve(ServedModel.load(block.server, PopConfig())) as serving:
        yield block.code.replace("http://127.0.0.1:8000", serving.url)


def _given(block: Block) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    for comment in block.comments:
        if found := re.fullmatch(r"given model: (\w+)", comment):
            names |= {"model": tiny(found[1]), "inputs": {"input_ids": torch.arange(3, 9)[None]}}
    return names
