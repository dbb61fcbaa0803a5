"""Decode speed on the libraries of a wheel against the ones that are compiled on this machine, in turn in one run.

    python benchmarks/shipped_kernels.py [--rounds 5]                                # compiled as scripts/dist.py does
    python benchmarks/shipped_kernels.py --wheel dist/pop_mm-0.2.0-*.whl             # those in a wheel of this very source

*This machine's* is what an install from source makes on first use (``-march=native``). Every variant that the processor runs
takes turns with it; the first is the one that a wheel's user gets. Dense on our kernels, thresholds (``budget=0.65``) and POP
(``ratio=0.2``) each decode through ``generate``; a step is the median time between two tokens, and *over this machine's* is the
ratio of steps in a round, so that above 1 the shipped library is faster. Target: the best variant reaches 0.97 in each.
Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.table import Table

import pop_mm
from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, save_json, wide_console
from pop_mm import kernels
from pop_mm.bench.prompts import Prompts
from pop_mm.bench.source import Source
from pop_mm.bench.timing import generate_timed
from pop_mm.native import compiler, shipped
from pop_mm.ops import library

OWN, TARGET = "this machine's", 0.97
SETTINGS: dict[str, dict[str, Any]] = {
    "dense, our kernels": {"ratio": 0.0, "kernels": "compiled"},
    "thresholds 0.65": {"budget": 0.65},
    "POP 20 %": {"ratio": 0.2},
}
Steps = dict[str, dict[str, list[float]]]  # library -> setting -> seconds, round by round


def unpack(wheel: Path, folder: Path) -> None:
    """Put a wheel's libraries into a folder.

    Raises
    ------
    SystemExit
        It holds none.
    """
    inside = "pop_mm/native/libraries/"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(inside) and name.endswith(".so")]
        if not names:
            raise SystemExit(f"{wheel} holds no libraries: build it with `make dist`.")
        for name in names:
            target = folder / name.removeprefix(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))


def compile_variants(variants: Sequence[shipped.Variant], dtype: torch.dtype) -> None:
    """Compile what a model of the dtype needs into :data:`shipped.FOLDER`, with a wheel's options."""
    for variant in variants:
        for sources in (*map(kernels.sources, kernels.DTYPES), library.sources(dtype)):
            shipped.build(sources, variant, shipped.FOLDER)


@contextmanager
def on(folder: Path, variant: shipped.Variant | None, dtype: torch.dtype) -> Iterator[None]:
    """Within: pop_mm has this variant's libraries; with None those that are compiled here.

    Raises
    ------
    SystemExit
        There is no library of this very source.
    """
    with (
        mock.patch.object(shipped, "FOLDER", folder if variant is not None else folder / "none"),
        mock.patch.object(
            shipped, "processor_flags", return_value=variant.needs if variant is not None else frozenset()
        ),
        mock.patch.object(compiler, "command", compiler.command if variant is None else list),
    ):
        try:
            for made in (kernels._library, library._library):
                made.cache_clear()
            if (reason := kernels.why_not() or library.why_not_dtypes(dtype)) is not None:
                raise SystemExit(f"{OWN if variant is None else variant.name}: no library of this source ({reason}).")
            yield
        finally:
            for made in (kernels._library, library._library):
                made.cache_clear()


def step_of(model: Any, settings: dict[str, Any], prompts: Sequence[torch.Tensor], new_tokens: int) -> float:
    """Median seconds between two tokens of the second answer: the first one turns or moves the weights."""
    with pop_mm.prune(model, **settings) as session:
        generate_timed(model, prompts[0], 4)
        timed = generate_timed(model, prompts[1], new_tokens)
        if session.report.to_dict()["kernels"] != "compiled":
            raise SystemExit(f"{settings} did not run on the compiled kernels: {session.report.backends}")
    return timed.step


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a sample's name, a folder or a hub id")
    parser.add_argument("--wheel", type=Path, help="take its libraries; else they are compiled with its options")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="only show that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.quick:
        args.prompt, args.new_tokens, args.rounds = 16, 8, 1
    torch.set_num_threads(args.threads)
    console, facts = wide_console(), machine_facts()
    print_machine(console, facts)
    flags = shipped.processor_flags()
    variants = [variant for variant in shipped.VARIANTS.get(platform.machine(), ()) if variant.needs <= flags]
    if not variants:
        raise SystemExit(f"No libraries are shipped for {platform.machine()!r}.")
    source = Source(args.model)
    model, tokenizer = source.load(torch.device("cpu"))
    libraries = {OWN: None, **{variant.name: variant for variant in variants}}
    steps: Steps = {name: {setting: [] for setting in SETTINGS} for name in libraries}
    with tempfile.TemporaryDirectory() as scratch, mock.patch.object(shipped, "FOLDER", Path(scratch)):
        if args.wheel is None:
            compile_variants(variants, model.dtype)
        else:
            unpack(args.wheel, Path(scratch))
        for number in range(args.rounds):
            prompts = [Prompts(model, tokenizer, seed).ids(number, 1, args.prompt) for seed in (0, 1)]
            order = list(libraries.items())
            for name, variant in order if number % 2 == 0 else reversed(order):
                with on(Path(scratch), variant, model.dtype):
                    for setting, settings in SETTINGS.items():
                        steps[name][setting].append(step_of(model, settings, prompts, args.new_tokens))
    table = Table(title=f"{source.label}, {args.prompt} tokens in, {args.new_tokens} out, {args.rounds} rounds")
    for name in ("library", "setting", "step ms", f"over {OWN}"):
        table.add_column(name, justify="left" if name in ("library", "setting") else "right", no_wrap=True)
    verdicts: list[Verdict] = []
    judged = not args.quick and (args.prompt, args.new_tokens) == (128, 128)
    for name, found in steps.items():
        for setting, mine in found.items():
            over = [own / step for own, step in zip(steps[OWN][setting], mine, strict=True)]
            middle = statistics.median(over)
            shown = f"{middle:.2f} [{min(over):.2f}, {max(over):.2f}]"
            table.add_row(name, setting, f"{1e3 * statistics.median(mine):.1f}", "-" if name == OWN else shown)
            if name == variants[0].name:
                said = f"{name}, {setting}: {middle:.2f} of {OWN} speed, at least {TARGET}"
                verdicts.append(Verdict(said, middle >= TARGET if judged else None))
    console.print(table)
    save_json(args.json, {"machine": facts, "steps": steps, "verdicts": [v.to_dict() for v in verdicts]})
    return print_verdicts(console, verdicts)


if __name__ == "__main__":
    sys.exit(main())
