"""The page: what is on it, and what happens when a question is asked."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import PopError
from ..settings.config import PopConfig
from ..vision import InputError
from . import words
from .asker import MAX_BYTES, MAX_CHARACTERS, MAX_NEW_TOKENS, Asker, AskError
from .examples import captions, examples
from .progress import Progress, Turn
from .style import CSS, thumbnail

_EVERY = 0.06  # seconds between updates of the page, at least: sending them costs decode time
_LONGEST = {True: 64, False: 128}  # tokens of an answer unless the user says otherwise, with and without images
_READY = "Press Ask, choose an example, or ask something else."

_log = logging.getLogger("pop_mm.app")


class Tab:
    """What one browser tab has asked; every tab gets a new one."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.stop = threading.Event()

    def __deepcopy__(self, memo: Any) -> Tab:
        return Tab()


def build_page(asker: Asker, config: PopConfig) -> Any:
    """The page as ``gradio.Blocks``, not served yet.

    Parameters
    ----------
    asker : Asker
    config : PopConfig
        Its method, and where its sliders start.
    """
    import gradio as gr

    pictures, chats = asker.takes_images, asker.chats
    first, asked_first = examples(pictures)[0]
    empty = words.panels(Progress(), config, 0)
    with gr.Blocks(title="pop_mm", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        tab = gr.State(Tab())
        gr.HTML(words.head(asker.name, str(asker.model.device), chats))
        with gr.Row():
            with gr.Column(scale=2, min_width=280, visible=pictures):
                picture = gr.Image(
                    value=None if first is None else str(first),
                    label=f"Image, up to {MAX_BYTES // 2**20} MB",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=200,
                    elem_id="picture",
                )
                # load_image reads the file, within its limits and with its messages; gradio would decode it first.
                picture.preprocess = lambda payload: None if payload is None else payload.path
            with gr.Column(scale=3, min_width=300):
                question = gr.Textbox(
                    label="Question",
                    value=asked_first,
                    max_length=MAX_CHARACTERS,
                    lines=1,
                    max_lines=6,
                    elem_id="question",
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", min_width=100)
                    forget = gr.Button("New conversation", elem_id="forget", min_width=100, visible=chats)
                _add_examples(gr, pictures, picture, question)
                with gr.Accordion("Settings", open=False, elem_id="settings"):
                    sliders = _sliders(gr, asker.amounts(config), config, _LONGEST[pictures])
        status = gr.HTML(
            words.line(_READY), elem_id="status", js_on_load="element.setAttribute('role', 'status');", padding=False
        )
        with gr.Row(equal_height=True):
            boxes = []
            for name, value in zip(("dense", "pruned"), empty, strict=True):
                with gr.Column(min_width=280):
                    boxes.append(gr.HTML(value, elem_id=name, padding=False))
        result = gr.HTML("", elem_id="result", padding=False)
        shown = [*boxes, status, result]
        gr.on(
            [ask.click, question.submit],
            partial(_answer, gr, asker, config),
            [tab, picture, question, *sliders],
            [*shown, question],
            show_progress="hidden",
            concurrency_limit=None,  # the asker has a line of its own, and the page says how long it is
            api_name="ask",
        )
        private: dict[str, Any] = dict(show_progress="hidden", api_visibility="private", queue=False)
        stop.click(lambda tab: tab.stop.set(), tab, None, **private)
        forget.click(lambda tab: _forget(tab, empty), tab, shown, **private)
    page.queue(max_size=None)
    return page


def css() -> str:
    """The style sheet, with the examples' pictures."""
    rules = (thumbnail(f"example-{n}", image) for n, (image, _) in enumerate(examples(True)) if image)
    return CSS + "".join(rules)


def _sliders(gr: Any, amounts: list[float], config: PopConfig, longest: int) -> list[Any]:
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
            value=getattr(config.chosen, "gamma", 0.1),
            step=0.05,
            label="Gamma: share of an FFN's channels that are candidates",
            elem_id="gamma",
            visible=config.chosen_method == "pop",
        ),
        gr.Slider(8, MAX_NEW_TOKENS, value=longest, step=8, label="Longest answer, in tokens", elem_id="longest"),
    ]


def _add_examples(gr: Any, pictures: bool, picture: Any, question: Any) -> None:
    """Buttons that fill in the page, each named after its picture and question."""
    with gr.Row(elem_id="examples"):
        for number, ((image, text), caption) in enumerate(zip(examples(pictures), captions(pictures), strict=True)):
            name = f"example-{number}" if pictures else f"example-text-{number}"
            button = gr.Button(caption, size="sm", min_width=150, elem_id=name)
            filled = ([str(image), text], [picture, question]) if image else (text, question)
            button.click(
                lambda values=filled[0]: values,
                None,
                filled[1],
                show_progress="hidden",
                api_visibility="private",
                queue=False,
            )


def _forget(tab: Tab, empty: tuple[str, str]) -> tuple[str, ...]:
    """Begin a new conversation; an answer that is being given ends."""
    tab.stop.set()
    tab.turns = []
    return *empty, words.line("A new conversation."), ""


def _answer(
    gr: Any,
    asker: Asker,
    config: PopConfig,
    tab: Tab,
    picture: str | None,
    question: str,
    amount: float,
    gamma: float,
    longest: float,
) -> Iterator[tuple[Any, ...]]:
    """What the page shows, again and again: both answers, the status, the figures below, and what is left in the box."""
    turns, stop = tab.turns, threading.Event()
    tab.stop, earlier, last, most = stop, tuple(turns), Progress(), int(longest)
    changes = {**config.changes(), "budget" if config.ratio is None else "ratio": amount}
    if config.chosen_method == "pop":
        changes["method_settings"] = {**changes.get("method_settings", {}), "gamma": gamma}

    def panels() -> tuple[str, str]:
        return words.panels(last, config, most, question if asker.chats else None, earlier)

    def failed(text: str) -> tuple[Any, ...]:
        return *panels(), words.line(text, "pop-error"), "", gr.skip()

    said = words.status(last)
    yield *panels(), said, "", gr.skip()
    try:
        steps = asker.ask(_file(picture), question, max_new_tokens=most, earlier=earlier, stop=stop, **changes)
        shown = 0.0
        with closing(steps):  # type: ignore[type-var]
            for progress in steps:
                done, last = progress.dense.done != last.dense.done, progress
                if done or progress.waiting or time.monotonic() - shown > _EVERY:
                    before, said = said, words.status(progress)
                    yield *panels(), gr.skip() if said == before else said, gr.skip(), gr.skip()
                    shown = time.monotonic()
        if last.report is None:
            kept = " This turn is not part of the conversation." if asker.chats else ""
            yield *panels(), words.line(f"Stopped.{kept}"), "", gr.skip()
            return
        if asker.chats:
            turns.append(Turn(question, last.dense.text, last.pruned.text))
        yield (
            *panels(),
            words.status(last),
            words.result(last, earlier, asker.advice(changes)),
            "" if asker.chats else gr.skip(),
        )
    except PopError as error:
        yield failed(str(error))
    except Exception as error:
        _log.exception("A question could not be answered.")
        yield failed(f"The question could not be answered ({type(error).__name__}); the terminal has the details.")


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
