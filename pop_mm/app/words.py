"""What the page says, as HTML: both answers and where they part, the figures below them, and the status."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ..report.report import Report
from ..report.threshold_report import ThresholdReport
from ..settings.config import PopConfig
from .progress import Answer, Progress, Turn

_ABOUT = {
    "tiny-vlm": "tiny-vlm is a toy: it names, counts and places one to four drawn shapes in eight colours. It knows nothing "
    "else, no photos either, and is too small to tell what pruning gains. A real model: --model Qwen/Qwen2.5-VL-3B-Instruct.",
    "smollm2-135m": "A very small model that often errs, dense or pruned: compare its two answers, not their truth.",
}
_ABOUT["tiny-vlm-moe"] = _ABOUT["tiny-vlm"].replace("tiny-vlm is", "tiny-vlm-moe is")
for _name in ("smollm2-mixtral", "smollm2-qwen2moe"):
    _ABOUT[_name] = (
        "Its experts are copies of a very small model's layers, and it often errs: compare its two answers, not their truth."
    )


def head(name: str, device: str, chats: bool) -> str:
    """What the page is, and what a sample can and cannot do."""
    about = f"<p>{escape(_ABOUT[name])}</p>" if name in _ABOUT else ""
    turns = " Each side goes on from its own answers." if chats else ""
    return (
        "<div class='pop-head'><h1>pop_mm: one model, dense and pruned</h1>"
        f"<p>{escape(name)} on {escape(device)} answers twice: as it is, and reading a part of its weights for each token."
        f"{turns}</p>{about}</div>"
    )


def line(text: str, style: str = "") -> str:
    """A line of text."""
    return f"<div class='pop-line {style}'>{escape(text)}</div>"


def status(progress: Progress) -> str:
    """What is being done."""
    if progress.waiting:
        others = "1 other question comes" if progress.waiting == 1 else f"{progress.waiting} other questions come"
        return line(f"Waiting: {others} first.")
    for name, answer in (("dense", progress.dense), ("pruned", progress.pruned)):
        if not answer.done:
            return line(f"Answering, {name}." if answer.tokens else f"Reading the prompt, {name}.")
    return line("Both answers are complete.")


def panels(
    progress: Progress, config: PopConfig, longest: int, question: str | None = None, earlier: Sequence[Turn] = ()
) -> tuple[str, str]:
    """Both answers; in a chat with its question, and the earlier turns below, the latest first.

    Parameters
    ----------
    progress : Progress
    config : PopConfig
    longest : int
        Tokens that an answer may have.
    question : str, optional
        In a chat.
    earlier : sequence of Turn
    """
    dense, pruned = progress.dense, progress.pruned
    texts = dense.text, pruned.text
    marked = part(*texts) if pruned.done and progress.same_tokens is not None else (escape(texts[0]), escape(texts[1]))
    method = "POP" if config.chosen_method == "pop" else config.chosen_method
    titles = "Dense: the model as it is", f"Pruned: {method}"
    before = [[(turn.question, turn.dense) for turn in earlier], [(turn.question, turn.pruned) for turn in earlier]]
    factors = None, progress.speedup
    return tuple(  # type: ignore[return-value]
        _panel(title, answer, text, factor, longest, question, turns)
        for title, answer, text, factor, turns in zip(titles, (dense, pruned), marked, factors, before, strict=True)
    )


def _panel(
    title: str,
    answer: Answer,
    text: str,
    factor: float | None,
    longest: int,
    question: str | None,
    earlier: Sequence[tuple[str, str]],
) -> str:
    asked = "" if question is None else f"<p class='pop-question'>{escape(question)}</p>"
    old = "".join(
        f"<p class='pop-question'>{escape(was)}</p><p class='pop-text'>{escape(said)}</p>"
        for was, said in earlier[::-1]
    )
    speed = f"<p class='pop-speed'>{_speed(answer, factor, longest)}</p>" if answer.tokens else ""
    return f"<div class='pop-panel'><h2>{escape(title)}</h2>{speed}{asked}<p class='pop-text'>{text}</p>{old}</div>"


def part(dense: str, pruned: str) -> tuple[str, str]:
    """Both texts as HTML, with the words marked where they first differ."""
    same = next((n for n, (one, other) in enumerate(zip(dense, pruned, strict=False)) if one != other), None)
    same = min(len(dense), len(pruned)) if same is None else same
    start = max(dense.rfind(space, 0, same) for space in " \n") + 1
    return _marked(dense, start), _marked(pruned, start)


def _marked(text: str, start: int) -> str:
    word, *_ = text[start:].split(maxsplit=1) or [""]
    end = text.find(word, start) + len(word)
    middle = f"<mark>{escape(text[start:end])}</mark>" if word else ""
    return escape(text[:start]) + middle + escape(text[end:])


def _speed(answer: Answer, factor: float | None, longest: int) -> str:
    count = f"{answer.tokens} token{'s' if answer.tokens > 1 else ''}"
    if not answer.done:
        return count
    cut = " (the longest answer)" if answer.tokens == longest else ""
    if answer.tokens_per_s is None:
        return f"{count}{cut}, too few to time"
    times = f" ({factor:.2f}x)" if factor else ""
    return f"{count}{cut}, <b>{answer.tokens_per_s:.1f} tokens/s{times}</b>"


def result(progress: Progress, earlier: Sequence[Turn] = (), advice: str | None = None) -> str:
    """The figures of two complete answers: speed, share that was read, where they part; and details, folded.

    Parameters
    ----------
    progress : Progress
        The last one.
    earlier : sequence of Turn
    advice : str, optional
        What is to be said of the settings.
    """
    report = progress.report
    assert report is not None
    facts = {
        "Decode speed": _factor(progress),
        "Read for a token": read(report),
        "Answers": _compared(progress, earlier),
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{_figure_first(text)}</dd></div>" for name, text in facts.items())
    kinds = ", ".join(f"{count} {name}" for name, count in report.modality_tokens.items() if count)
    what = "Inputs of matrices" if isinstance(report, ThresholdReport) else "FFNs"
    ran: dict[str, int] = {}
    for name, count in report.backends.items():
        how = {"masked": "masked (right, and no faster)", "dense": "dense"}.get(name, "fast")
        ran[how] = ran.get(how, 0) + count
    lines = [
        f"{report.prompt_tokens} prompt tokens" + (f" ({kinds})." if "," in kinds else "."),
        f"{what}: " + ", ".join(f"{count} {name}" for name, count in ran.items()) + ".",
        "Decode speed is without prefill, one run each: a rough figure. Dense is the model on PyTorch's own kernels.",
        *report.notes,
    ]
    if report.left_out_share is not None:
        lines.insert(
            0, f"{report.left_out_share:.1%} of all weights that a token reads were left out, output layer included."
        )
    said = "".join(f"<p>{escape(text)}</p>" for text in lines)
    warned = "" if advice is None else line(advice, "pop-error")
    return (
        f"<div class='pop-result'><dl class='pop-facts'>{shown}</dl>{warned}<details><summary>What each layer kept</summary>"
        f"{said}{figure(report)}</details></div>"
    )


def _figure_first(text: str) -> str:
    """A fact as HTML: what stands in brackets is smaller."""
    figure, bracket, more = text.partition(" (")
    return escape(figure) + (f" <span>({escape(more)}</span>" if bracket else "")


def _factor(progress: Progress) -> str:
    if progress.speedup is None:
        return "too few tokens to time"
    return f"{progress.speedup:.2f}x ({progress.dense.tokens_per_s:.1f} to {progress.pruned.tokens_per_s:.1f} tokens/s)"


def read(report: Report | ThresholdReport) -> str:
    """The share of the weights that a decoded token read."""
    of = "layers" if report.config.scope == "overall" else "FFNs"
    if isinstance(report, ThresholdReport):
        meant, kept = report.scope_share
        return f"{meant if kept is None else kept:.1%} of the {of}' weights (set: {meant:.0%})"
    ratios = sorted(ffn.plan.ratio for ffn in report.ffns)
    least, most = 1 - ratios[-1], 1 - ratios[0]
    return f"{least:.1%} of each FFN" if most - least < 5e-4 else f"{least:.1%} to {most:.1%} of each FFN"


def _compared(progress: Progress, earlier: Sequence[Turn]) -> str:
    same = progress.same_tokens
    if same is None:
        text = f"the same, all {progress.dense.tokens} tokens"
    else:
        text = f"the first {same} tokens are the same" if same else "differ from the first token on"
    return text + ("; earlier turns differed" if any(turn.dense != turn.pruned for turn in earlier) else "")


def figure(report: Report | ThresholdReport) -> str:
    """The report's picture, light and dark, of which the page shows the one that fits."""
    text = f"Share that decode steps kept, layer by layer. {read(report)}."
    if isinstance(report, ThresholdReport):
        kept = {name: shown for name, (_, shown) in report.kept_share.items() if shown is not None}
        text += " On average " + "; ".join(f"{name}: {share:.0%}" for name, share in kept.items()) + "." if kept else ""
    images = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("light", "dark"):
            data = base64.b64encode(report.plot(Path(folder) / "a.png", dark=name == "dark").read_bytes()).decode()
            images.append(f"<img class='pop-{name}' alt='{escape(text)}' src='data:image/png;base64,{data}'>")
    return (
        f"<div class='pop-figure' tabindex='0' role='group' aria-label='Picture of the layers'>{''.join(images)}</div>"
    )
