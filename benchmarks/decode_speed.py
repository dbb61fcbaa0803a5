"""Decode speed at batch 1, dense and pruned side by side in one run: FFN, whole model, and peak memory.

Run: ``python benchmarks/decode_speed.py [--only ffn|model|memory] [--model NAME | --config NAME --random-weights]
[--quick] [--json FILE]``; exit code 1 if a target fails. The whole model is measured as ``pop-mm bench`` does it. Timings need
a quiet machine: see the README here.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from speed_ffn import ffn_steps, ffn_table, ffn_verdicts, measure_ffn
from speed_verdicts import SPEEDUP, measure_peaks, memory_table, memory_verdicts, prefill_verdicts, speed_verdicts

from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, wide_console
from pop_mm.bench import Setup, measure, show, steps
from pop_mm.bench.variants import kernels_for
from pop_mm.cli.bench import source_of
from pop_mm.cli.terminal import quiet

STANDARD_MODEL = "smollm2-135m"
PARTS = ("ffn", "model", "memory")
CPU = torch.device("cpu")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"sample name, folder or hub id ({STANDARD_MODEL})")
    parser.add_argument("--config", metavar="NAME", help="published dimensions instead, as for pop-mm bench")
    parser.add_argument("--random-weights", action="store_true", help="of --config")
    parser.add_argument("--layers", type=int, help="of --config: build fewer layers")
    parser.add_argument("--only", choices=PARTS, help="one part instead of all")
    parser.add_argument("--prompt", type=int, help="prompt tokens of the whole model (128)")
    parser.add_argument("--new-tokens", type=int, help="decoded tokens of the whole model (128)")
    parser.add_argument("--rounds", type=int, help="rounds of the FFN part (15) and of the model part (7)")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr; call what it yields after each of ``total`` steps."""
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    name = args.config or args.model or STANDARD_MODEL
    source = source_of(None if args.config else name, args.config, args.random_weights, args.layers, "auto")
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    prompt = args.prompt or (16 if args.quick else 128)
    new_tokens = args.new_tokens or (8 if args.quick else 128)
    rounds = {"ffn": args.rounds or (2 if args.quick else 15), "model": args.rounds or (2 if args.quick else 7)}
    repeats = 1 if args.quick else 3
    parts = PARTS if args.only is None else (args.only,)
    standard = not args.quick and name in SPEEDUP and args.layers is None and (prompt, new_tokens) == (128, 128)
    setup = Setup(prompts=[prompt], new_tokens=new_tokens, rounds=rounds["model"])
    settings = {
        "model": source.label,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "quick": args.quick,
    }
    result: dict[str, Any] = {"machine": machine, "settings": settings}
    verdicts: list[Verdict] = []

    if "memory" in parts:  # first, while this process is small
        with progress_bar("memory", 2 * repeats) as tick:
            memory = measure_peaks(source, setup, repeats, tick)
        console.print(memory_table(memory, source.label))
        result["memory"] = memory
        verdicts += memory_verdicts(memory, standard)
    if "ffn" in parts:
        with progress_bar("FFN", ffn_steps(args.quick)) as tick:
            ffn = measure_ffn(args.quick, rounds["ffn"], tick)
        console.print(ffn_table(ffn))
        result["ffn"] = [row.to_dict() for row in ffn]
        verdicts += ffn_verdicts(ffn, not args.quick)
    if "model" in parts:
        with quiet():
            model, tokenizer = source.load(CPU)
            longer = replace(setup, prompts=[32 if args.quick else 512], new_tokens=8)
            setup = replace(setup, kernels=kernels_for(CPU, model.dtype))
            for part, own in (("model", setup), ("prefill", longer)):
                with progress_bar(f"whole model, {own.prompts[0]} tokens in", steps(own)) as tick:
                    result[part] = {"model": source.label, **measure(model, tokenizer, own, tick)}
                show.print_tables(console, result[part])
        verdicts += speed_verdicts(result["model"], name, standard)
        verdicts += prefill_verdicts(result["prefill"], standard)

    result["load_average_at_end"] = machine_facts()["load_average"]
    result["verdicts"] = [verdict.to_dict() for verdict in verdicts]
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, verdicts)


if __name__ == "__main__":
    sys.exit(main())
