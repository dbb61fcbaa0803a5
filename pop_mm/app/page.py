"""The page: what is on it, and what happens when a question is asked."""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from ..config import PopConfig
from ..errors import PopError
from ..report import Report
from ..threshold_report import ThresholdReport
from ..vision import InputError
from .asker import MAX_BYTES, MAX_CHARACTERS, MAX_NEW_TOKENS, Answer, Asker, AskError, Progress
from .examples import examples

_EVERY = 0.06  # seconds between updates of the page, at least: sending them costs decode time
_LONGEST = 64  # tokens of an answer, unless the user says otherwise
MOST_WAITING = 16

CSS = """
.pop-line { min-height: 1.6em; font-variant-numeric: tabular-nums; }
.pop-error { color: #b42318; font-weight: 600; overflow-wrap: anywhere; }
.dark .pop-error { color: #ff8a80; }
.pop-notes { opacity: 0.75; overflow-wrap: anywhere; }
.pop-answer { gap: 4px; }
#picture img { object-fit: contain; }
#channels img { width: 100%; background: white; }
"""

_log = logging.getLogger("pop_mm.app")


def build_page(asker: Asker, config: PopConfig) -> Any:
    """The page as ``gradio.Blocks``, not served yet.

    Parameters
    ----------
    asker : Asker
    config : PopConfig
        Its method, and where its sliders start.
    """
    import gradio as gr

    with gr.Blocks(title="pop_mm", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            f"<h1>pop_mm: dense and pruned, side by side</h1><div class='pop-notes'>{escape(asker.name)} on "
            f"{escape(str(asker.model.device))}. The model answers twice; for the second answer {_left_out(config)} while it "
            "decodes.</div>",
            padding=False,
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=280, visible=asker.takes_images):
                picture = gr.Image(
                    label=f"Image, up to {MAX_BYTES // 2**20} MB",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=300,
                    elem_id="picture",
                )
                # load_image reads the file, within its limits and with its messages; gradio would decode it first.
                picture.preprocess = lambda payload: None if payload is None else payload.path
            with gr.Column(scale=3, min_width=320):
                question = gr.Textbox(
                    label="Question",
                    value=examples(asker.takes_images)[0][1],
                    max_length=MAX_CHARACTERS,
                    lines=1 if asker.takes_images else 3,
                    elem_id="question",
                )
                sliders = _sliders(gr, asker.amounts(config), config)
        _add_examples(gr, asker, picture, question)
        with gr.Row():
            ask = gr.Button("Ask", variant="primary", elem_id="ask")
            stop = gr.Button("Stop", elem_id="stop")
        with gr.Row(equal_height=True):
            boxes = []
            for name, label in (("dense", "Dense"), ("pruned", "Pruned")):
                with gr.Column(min_width=280, elem_classes="pop-answer"):
                    text = gr.Textbox(label=label, lines=3, max_lines=12, interactive=False, elem_id=name)
                    speed = gr.HTML(_line(""), elem_id=f"{name}-speed", padding=False)
                boxes += [text, speed]
        status = gr.HTML(_line("Pick an example or ask a question of your own."), elem_id="status", padding=False)
        channels = gr.Image(
            label="Channels of every layer",
            show_label=False,
            interactive=False,
            buttons=["fullscreen"],
            visible=False,
            elem_id="channels",
        )
        asked = gr.on(
            [ask.click, question.submit],
            partial(_answer, gr, asker, config),
            [picture, question, *sliders],
            [*boxes, status, channels],
            show_progress="minimal",
            show_progress_on=[status],
            concurrency_limit=1,
            api_name="ask",
        )
        stopped = stop.click(None, cancels=[asked], queue=False, api_visibility="private")
        # afterwards, and through the queue: what was still on its way to the page comes before it
        stopped.then(lambda: _line("Stopped."), None, status, show_progress="hidden", api_visibility="private")
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)
    return page


def _left_out(config: PopConfig) -> str:
    """The beginning of a sentence about the method."""
    if config.chosen_method == "thresholds":
        return "thresholds from the prompt leave the smallest inputs of its matrices out"
    return f"{config.chosen_method.upper()} leaves channels of its FFNs out"


def _sliders(gr: Any, amounts: list[float], config: PopConfig) -> list[Any]:
    """Budget or ratio, gamma and the longest answer."""
    by_budget = config.ratio is None
    start = config.ratio or 0.0 if config.budget is None else config.budget
    of = "attention and FFN weights" if config.scope == "overall" else "FFN weights"
    return [
        gr.Slider(
            min(amounts[0], start) if by_budget else 0,
            1 if by_budget else max(amounts[-1], start),
            value=start,
            step=0.05 if round(20 * start, 6).is_integer() else 0.01,
            label=f"Budget: share of {of} that a token reads" if by_budget else f"Ratio: share of {of} to leave out",
            elem_id="budget" if by_budget else "ratio",
        ),
        gr.Slider(
            0,
            0.5,
            value=config.gamma,
            step=0.05,
            label="Gamma: share of an FFN's channels that are candidates",
            elem_id="gamma",
            visible=config.chosen_method == "pop",
        ),
        gr.Slider(8, MAX_NEW_TOKENS, value=_LONGEST, step=8, label="Longest answer, in tokens", elem_id="longest"),
    ]


def _add_examples(gr: Any, asker: Asker, picture: Any, question: Any) -> None:
    """A row of pictures, or of questions, that fill in the page."""
    rows = examples(asker.takes_images)
    shown = gr.Dataset(
        components=[picture if asker.takes_images else question],
        samples=[[str(image) if image else text] for image, text in rows],
        type="index",
        label="Examples",
        elem_id="examples",
    )

    def pick(index: int) -> tuple[str | None, str]:
        image, text = rows[index]
        return str(image) if image else None, text

    shown.click(pick, shown, [picture, question], show_progress="hidden", api_visibility="private")


def _answer(
    gr: Any,
    asker: Asker,
    config: PopConfig,
    picture: str | None,
    question: str,
    amount: float,
    gamma: float,
    longest: float,
) -> Iterator[tuple[Any, ...]]:
    """What the page shows, again and again: both answers, both speeds, the line below them and the picture."""
    hidden = gr.update(value=None, visible=False)
    yield "", _line(""), "", _line(""), _line("Reading the prompt ..."), hidden
    shown, last = 0.0, Progress()
    try:
        settings = {**config.changes(), "budget" if config.ratio is None else "ratio": amount}
        if config.chosen_method == "pop":
            settings["gamma"] = gamma
        steps = asker.ask(_file(picture), question, max_new_tokens=int(longest), **settings)
        with closing(steps):  # type: ignore[type-var]
            for progress in steps:
                done = progress.dense.done != last.dense.done or progress.report is not None
                last = progress
                if done or time.monotonic() - shown > _EVERY:
                    yield *_texts(progress), _line("Answering ..."), gr.skip()
                    shown = time.monotonic()
        if last.report is None:
            return
        yield *_texts(last), summary(last.report), gr.skip()
        with tempfile.NamedTemporaryFile(suffix=".png") as file:  # gradio copies it, and deletes the copy in time
            draw(last.report, file.name)
            yield *_texts(last), summary(last.report), gr.update(value=file.name, visible=True)
    except PopError as error:
        yield *_texts(last), _line(str(error), "pop-error"), hidden
    except Exception as error:
        _log.exception("A question could not be answered.")
        text = f"The question could not be answered ({type(error).__name__}); the terminal has the details."
        yield *_texts(last), _line(text, "pop-error"), hidden


def draw(report: Report | ThresholdReport, path: str) -> None:
    """Save the picture below the answers as PNG."""
    report.plot(path)


def summary(report: Report | ThresholdReport) -> str:
    """What was pruned, in a line or two of HTML."""
    facts = _of_thresholds(report) if isinstance(report, ThresholdReport) else _of_channels(report)
    if report.left_out_share is not None:
        facts.append(f"{report.left_out_share:.1%} of all weights that a token reads left out")
    kinds = ", ".join(f"{count} {name}" for name, count in report.modality_tokens.items() if count)
    facts.append(f"{report.prompt_tokens} prompt tokens" + (f" ({kinds})" if "," in kinds else ""))
    what = "Inputs" if isinstance(report, ThresholdReport) else "FFNs"
    facts.append(f"{what}: " + ", ".join(f"{count} {name}" for name, count in report.backends.items()))
    notes = "".join(f"<div class='pop-notes'>{escape(note)}</div>" for note in report.notes)
    rough = "<div class='pop-notes'>Decode speed without prefill, one run each: a rough figure.</div>"
    return f"<div class='pop-line'>{escape('; '.join(facts))}.</div>{rough}{notes}"


def _of_channels(report: Report) -> list[str]:
    ratios = sorted(ffn.plan.ratio for ffn in report.ffns)
    of_each = f"{ratios[0]:.1%}" if ratios[-1] - ratios[0] < 5e-4 else f"{ratios[0]:.1%} to {ratios[-1]:.1%}"
    return [f"{of_each} of each FFN left out"]


def _of_thresholds(report: ThresholdReport) -> list[str]:
    meant, kept = report.scope_share
    of = "attention and FFN weights" if report.config.scope == "overall" else "FFN weights"
    return [f"{meant if kept is None else kept:.1%} of {of} read (meant: {meant:.1%})"]


def _texts(progress: Progress) -> tuple[str, str, str, str]:
    dense, pruned = progress.dense, progress.pruned
    return dense.text, _speed(dense, None), pruned.text, _speed(pruned, progress.speedup)


def _speed(answer: Answer, factor: float | None) -> str:
    if not answer.tokens:
        return _line("")
    count = f"{answer.tokens} token{'s' if answer.tokens > 1 else ''}"
    if not answer.done:
        return _line(count)
    if answer.tokens_per_s is None:
        return _line(f"{count}, too few to time")
    times = f" ({factor:.2f}x)" if factor else ""
    return f"<div class='pop-line'>{count}, <b>{answer.tokens_per_s:.1f} tokens/s{times}</b></div>"


def _line(text: str, style: str = "") -> str:
    return f"<div class='pop-line {style}'>{escape(text)}</div>"


def _file(path: str | None) -> io.BytesIO | None:
    """An uploaded file in memory, which messages call by its name and not by the place where it is kept."""
    if path is None:
        return None
    source = Path(path)
    try:
        if not source.is_file():
            raise AskError("The image is no longer there: upload it again.")
        if source.stat().st_size > MAX_BYTES:
            raise InputError(f"The image has more than {MAX_BYTES // 2**20} MB. Save it smaller and upload it again.")
        file = io.BytesIO(source.read_bytes())
    except OSError as error:
        raise AskError("The image cannot be read: upload it again.") from error
    file.name = source.name
    return file
