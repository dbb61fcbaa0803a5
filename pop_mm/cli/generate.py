"""``pop-mm generate``: one prompt, answered dense and pruned."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PopError
from ..inputs import check_tokens, context_of
from ..report.report import Report
from ..report.tables import answers_table, report_summary
from ..report.threshold_report import ThresholdReport, threshold_summary
from ..samples import load, resolve
from ..samples.quantise import check_weights
from ..session.session import Session, prune
from ..settings.config import PopConfig
from . import loudness
from .terminal import CommandError, check_writable, path_errors, quiet, save_then, spinner, warn, write_json

_WARM_UP = 4  # tokens of the prompt and of the answer in a warm-up
_COLDEST = 0.001  # logits divided by less overflow
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Sampling:
    """How the answer is generated.

    Attributes
    ----------
    max_new_tokens : int
    temperature : float
        0 is greedy.
    seed : int
    chat : bool
        Whether to use the tokenizer's chat template.
    """

    max_new_tokens: int
    temperature: float
    seed: int
    chat: bool

    @property
    def asks_for(self) -> str:
        """The length that was asked for, within a sentence."""
        return f"--max-new-tokens asks for {self.max_new_tokens} more"

    def settings(self) -> dict[str, Any]:
        """Arguments of ``model.generate``."""
        choice = {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}
        return {**choice, "num_beams": 1, "max_new_tokens": self.max_new_tokens}


class Clock:
    """A streamer for ``generate`` that notes when each token comes; the prompt comes first."""

    def __init__(self, tick: Callable[[], object] = lambda: None) -> None:
        self.times: list[float] = []
        self._tick = tick

    def put(self, value: Tensor) -> None:
        """A token, or at first the prompt."""
        self.times.append(time.perf_counter())
        self._tick()

    def end(self) -> None:
        """The answer is complete."""

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens per second from the first to the last token: decode without prefill; None for a single token."""
        tokens = self.times[1:]
        return (len(tokens) - 1) / (tokens[-1] - tokens[0]) if len(tokens) > 1 else None


def run(
    name: str,
    prompt: str,
    config: PopConfig,
    sampling: Sampling,
    dtype: str,
    device: str,
    json_file: str | None,
    plot: str | None,
    weights: str = "auto",
) -> None:
    """The command: answer, print, and save where asked. Everything that can be checked early is checked first."""
    check_outputs(json_file, plot)
    check_words("prompt", prompt, sampling)
    check_weights(weights)
    where = find_device(device)
    with quiet():
        model, tokenizer = load_model(name, dtype, where, weights)
        inputs = encode(model, tokenizer, prompt, sampling)
        start = {key: value[:, :_WARM_UP] for key, value in inputs.items()}
        both = compare(model, tokenizer, inputs, start, config, sampling)
    asked = {"model": name, "prompt": prompt, "weight_format": weights}
    both.show(asked, json_file, None if plot is None else lambda: both.report.plot(plot))


@dataclass(frozen=True)
class Comparison:
    """Both answers to one prompt.

    Attributes
    ----------
    dense, pruned : dict
        As :func:`answer` returns them.
    report : Report or ThresholdReport
        Of the pruned one.
    """

    dense: dict[str, Any]
    pruned: dict[str, Any]
    report: Report | ThresholdReport

    @property
    def titled(self) -> dict[str, dict[str, Any]]:
        """Title to answer."""
        return {"dense": self.dense, f"pruned, {self.report.config.label}": self.pruned}

    def show(self, asked: dict[str, Any], json_file: str | None, draw: Callable[[], Path] | None) -> None:
        """Save where asked, then print: JSON begins with ``asked``, and ``draw`` saves a picture."""
        answers = {"config": self.report.config.to_dict(), "dense": self.dense, "pruned": self.pruned}
        values = {**asked, **answers, "report": self.report.to_dict()}
        console = Console(stderr=json_file == "-")
        saves: list[Callable[[], object]] = []
        pictures: list[Path] = []
        if json_file is not None:
            saves.append(lambda: write_json(values, json_file))
        if draw is not None:
            saves.append(lambda: pictures.append(draw()))

        def print_all() -> None:
            if loudness.silent():
                console.print(self.pruned["text"].strip(), highlight=False, markup=False, soft_wrap=True)
                return
            console.print(answers_table(self.titled))
            console.print("Decode speed without prefill, one run each: a rough figure.\n", style="dim")
            summary = threshold_summary if isinstance(self.report, ThresholdReport) else report_summary
            console.print(summary(self.report))  # type: ignore[arg-type]
            for picture in pictures:
                console.print(f"Picture: {picture}", highlight=False, markup=False, soft_wrap=True)

        save_then(saves, print_all)


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    config: PopConfig,
    sampling: Sampling,
) -> Comparison:
    """Answer dense and then pruned, each after a warm-up on ``start``."""
    session = Session(model, config)  # first, since it checks that the ratio fits the model
    warm_up(model, start)
    dense = answer(model, tokenizer, inputs, sampling, "dense")
    with prune(model, config):
        warm_up(model, start)
    with session:
        return Comparison(dense, answer(model, tokenizer, inputs, sampling, "pruned"), session.report)


def check_outputs(json_file: str | None, plot: str | None) -> None:
    """Complain about files that cannot be written, before any work is done."""
    if plot is not None:
        from ..report.plotting import check_path

        with path_errors(plot):
            check_writable(check_path(plot))
    if json_file is not None and json_file != "-":
        check_writable(json_file)


def check_words(what: str, text: str, sampling: Sampling) -> None:
    """Complain about a prompt or question without words or in another encoding, and about a temperature that overflows."""
    if not text.strip():
        raise CommandError(f"The {what} is empty: it needs at least one word.")
    if not is_unicode(text):
        raise CommandError(f"The {what} is not valid UTF-8: check the encoding of the terminal or file it comes from.")
    if 0 < sampling.temperature < _COLDEST:
        raise CommandError(
            f"--temperature {sampling.temperature:g} is too near 0 to sample; take 0 (greedy) or {_COLDEST} and more."
        )


def is_unicode(text: str) -> bool:
    """Whether a text has no half characters, as another encoding leaves them behind."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def find_device(name: str) -> torch.device:
    """The device that the user named; ``auto`` is a GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"The device {name!r} cannot be used; say cpu, cuda, cuda:1 ... or auto.") from error
    return device


def torch_dtype(name: str) -> torch.dtype | str:
    """The dtype that the user named, or ``"auto"``."""
    if name not in _DTYPES:
        raise CommandError(f"The dtype must be one of {', '.join(_DTYPES)}; got {name!r}.")
    return name if name == "auto" else getattr(torch, name)


def load_model(
    name: str, dtype: str, device: torch.device | None = None, weights: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer behind a spinner."""
    kind = torch_dtype(dtype)
    resolve(name)  # a sample is fetched here, with its own progress display
    with spinner(f"Loading {name}"):
        return load(name, dtype=kind, device=device, weights=weights)


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling
) -> dict[str, Tensor]:
    """The prompt's ``input_ids`` and ``attention_mask``, ``[1, tokens]``, within the model's context."""
    try:
        inputs = tokenize(model, tokenizer, prompt, sampling.chat)
    except PopError:
        raise
    except Exception as error:
        raise CommandError(
            f"The tokenizer cannot encode the prompt: {error} (--no-chat leaves out its template)."
        ) from error
    tokens = inputs["input_ids"].shape[1]
    if tokens == 0:
        raise CommandError("The prompt has no tokens.")
    check_context(
        model,
        tokens + sampling.max_new_tokens,
        f"The prompt has {tokens} tokens and {sampling.asks_for}",
        "for fewer tokens",
    )
    return inputs


def tokenize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    chat: bool = True,
    earlier: Sequence[tuple[str, str]] = (),
) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, ``[1, tokens]``, of a text, as a chat's turn if there is a template for it.

    ``earlier`` are the questions and answers before it, which only a template can put in.

    Raises
    ------
    TokenError
        The tokenizer knows a token that the model's embedding has no row for. A template raises whatever it stumbles over.
    """
    if chat and tokenizer.chat_template:
        roles = ("user", "assistant")
        turns = [{"role": role, "content": said} for turn in earlier for role, said in zip(roles, turn, strict=True)]
        turns.append({"role": "user", "content": text})
        encoded = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    check_tokens(model, encoded["input_ids"], tokenizer)
    return {key: encoded[key].to(model.device) for key in ("input_ids", "attention_mask")}


def exceeded_context(model: PreTrainedModel, tokens: int, max_new_tokens: int) -> int | None:
    """The model's context in tokens if a prompt and its answer do not fit in, else None."""
    context = context_of(model)
    return context.tokens if context and tokens + max_new_tokens > context.tokens else None


def check_context(model: PreTrainedModel, tokens: int, asked: str, remedy: str) -> None:
    """Complain about more tokens than the model has positions for; warn where they only cost quality.

    Parameters
    ----------
    model : PreTrainedModel
    tokens : int
        Of the prompt and what follows.
    asked, remedy : str
        "The prompt has ... more" and what to ask for instead.
    """
    context = context_of(model)
    if context is None or tokens <= context.tokens:
        return
    found = f"{asked}, but the model's context is {context.tokens} tokens"
    if context.fixed:
        raise CommandError(f"{found}, and it has no positions beyond. Ask {remedy}.")
    warn(f"{found}: beyond them its answers get worse.")


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Tensor],
    sampling: Sampling,
    label: str,
) -> dict[str, Any]:
    """Generate once and measure the decode speed.

    Returns
    -------
    dict
        ``text`` and ``decode_tokens_per_s``.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.completed} tokens"), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = loudness.silent() or not console.is_terminal
    with Progress(*columns, console=console, transient=True, refresh_per_second=4, disable=hidden) as progress:
        task = progress.add_task(label, completed=-1)
        clock = Clock(lambda: progress.advance(task))
        torch.manual_seed(sampling.seed)
        output = model.generate(**inputs, **sampling.settings(), streamer=clock)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"text": text, "decode_tokens_per_s": clock.decode_tokens_per_s}


def warm_up(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> None:
    """Generate a few tokens, so that the costs of a first call do not count against the first answer."""
    model.generate(**inputs, do_sample=False, num_beams=1, min_new_tokens=_WARM_UP, max_new_tokens=_WARM_UP)
