"""``pop-mm eval``: what pruning costs in quality, on text, by method, ratio and gamma."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..evaluation import show, texts
from ..evaluation.run import UNITS, EvaluationError, Run, Setup, grid
from ..evaluation.texts import Window
from ..methods import Pop
from ..samples import load_passages
from ..samples.quantise import check_weights, quantised_copy
from ..session.session import Session, plan_ffns
from ..settings.config import PopConfig
from . import loudness
from .generate import check_context, find_device, load_model
from .terminal import CommandError, check_writable, path_errors, quiet, save_then, write_json, write_text

_FEW = 2000  # calibration tokens


@dataclass(frozen=True)
class Source:
    """Where the texts come from: passages that ship with pop_mm if nothing is named.

    Attributes
    ----------
    files, calibration : sequence of str
    dataset, subset : str or None
        A hub id, or a JSON-lines, CSV, Parquet or text file.
    split, column : str
    limit : int or None
        Most windows.
    """

    files: Sequence[str] = ()
    dataset: str | None = None
    subset: str | None = None
    split: str = "test"
    column: str = "text"
    limit: int | None = None
    calibration: Sequence[str] = ()


def run(
    setup: Setup,
    methods: Sequence[str],
    ratios: Sequence[float],
    gammas: Sequence[float],
    prefills: Sequence[str],
    source: Source,
    output: str | None,
    dtype: str,
    device: str,
    json_file: str | None,
    budgets: Sequence[float] = (),
    wide: bool = True,
) -> None:
    """The command; all of it is checked before the model is loaded."""
    if output == "":
        raise CommandError("--output is empty: name a folder.")
    if source.files and source.dataset is not None:
        raise CommandError("Give --text or --dataset, not both.")
    points = grid(methods, ratios, gammas, prefills, budgets)
    for name in methods:
        if all(point.method != name for point in points):
            given, other = ("--budget", "--ratio") if budgets else ("--ratio", "--budget")
            raise CommandError(f"The method {name} has no {given[2:]}: give {other}.")
    for budget in budgets:
        PopConfig(scope=setup.scope, budget=budget)  # type: ignore[arg-type]
    for ratio in ratios:
        for gamma in gammas:
            for prefill in prefills:
                method = Pop(gamma=gamma, prefill=prefill)  # type: ignore[arg-type]
                PopConfig(ratio, setup.scope, method=method, batch=setup.batch)  # type: ignore[arg-type]
    folder = None if output is None else _make_folder(output)
    if json_file not in (None, "-"):
        check_writable(json_file)
    check_weights(setup.weight_format)
    where = find_device(device)
    named: dict[str, str | texts.Chats] = dict(texts.read_files(source.files))
    if source.dataset is not None:
        named = texts.read_dataset(source.dataset, source.split, source.column, source.subset)
    extra = texts.read_files(source.calibration)
    if "wanda_sp" in methods and named and not extra:
        raise EvaluationError("wanda_sp ranks channels by calibration text: give some (--calibration FILE).")
    console = Console(stderr=json_file == "-")
    with quiet():
        reference, tokenizer = load_model(setup.model, dtype, where)
        model = quantised_copy(reference, setup.weight_format)
        tokens = setup.prompt + max(setup.continuation, setup.generate)
        asked = f"--prompt and --continuation or --generate ask for {tokens} tokens"
        check_context(model, tokens, asked, "for fewer")
        windows = texts.windows(named or load_passages(), tokenizer, setup.tokens, source.limit)
        calibration: list[Window] = []
        if "wanda_sp" in methods:
            known = {window.name for window in windows} if not extra else set()
            every = texts.pieces(extra or load_passages(), tokenizer, setup.tokens)
            calibration = [window for window in every if window.name not in known]  # what is not scored
        texts.check_tokens(model, [*windows, *calibration], tokenizer)
        work = Run(model, setup, windows, calibration, folder, reference)
        for ratio in ratios:  # one that does not fit the model is found before the first forward
            plan_ffns(model, PopConfig(ratio, setup.scope))  # type: ignore[arg-type]
        for point in points:
            if point.budget is not None and point.method != "wanda_sp":  # which has its calibration yet to come
                Session(model, work.config(point))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        bars = Console(file=sys.stderr)
        with Progress(
            *columns, console=bars, transient=True, disable=loudness.silent() or not bars.is_terminal
        ) as progress:
            task = progress.add_task("evaluating", total=work.total(points))
            work.work(points, lambda: progress.advance(task))
    results = work.results(points)
    saves: list[Callable[[], object]] = []
    if json_file is not None:
        saves.append(lambda: write_json(results, json_file))
    if folder is not None:
        page = show.markdown(results, "pop-mm " + shlex.join(sys.argv[1:]))
        saves += [
            lambda: write_json(results, str(folder / "results.json")),
            lambda: write_text(page, folder / "results.md"),
            lambda: show.plot(results, folder / "quality.png"),
        ]

    def print_all() -> None:
        show.print_table(console, results, wide)
        tokens = results["setup"]["calibration_tokens"]
        if "wanda_sp" in methods and tokens < _FEW:
            console.print(
                f"wanda_sp was calibrated on {tokens} tokens only: give more text (--calibration).", style="yellow"
            )

    save_then(saves, print_all)
    if folder is not None:
        console.print(
            f"Saved in {folder}: results.json, results.md, quality.png", highlight=False, markup=False, soft_wrap=True
        )


def _make_folder(output: str) -> Path:
    """The folder for the results, in which all of them can be written."""
    with path_errors(output):
        folder = Path(output).expanduser()
        if folder.exists() and not folder.is_dir():
            raise CommandError(f"--output must be a folder; {folder} is a file.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(f"The folder {folder} cannot be made: {error.strerror or error}.") from error
        for name in (UNITS, "results.json", "results.md", "quality.png"):
            check_writable(folder / name)
    return folder
