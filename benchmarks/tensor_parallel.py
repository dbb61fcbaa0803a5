"""What it costs that each process of a spread model chooses among its own channels: KL to the dense model.

Run: ``torchrun --nproc-per-node N benchmarks/tensor_parallel.py [--passages N] [--ratio R] [--json FILE]``; without torchrun it
is one process, whose figures those of ``tp_partition="global"`` must equal. What is scored: ``decode_fidelity.py``.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decode_fidelity import read_passages
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import pop_mm
from measure import machine_facts, print_machine, save_json, wide_console
from pop_mm.evaluation import score_texts, step_logits
from pop_mm.evaluation.intervals import difference
from pop_mm.samples import resolve


def load(folder: str) -> Any:
    """The model in float32, spread over torchrun's processes if there are several."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    spread = {"distributed_config": DistributedConfig(tp_size=processes)} if processes > 1 else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **spread).eval()


def main(argv: Sequence[str] | None = None) -> None:
    """Score the passages in every process, and print the table in the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="sample name or folder")
    parser.add_argument("--passages", type=int, help="how many (default: all)")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--quick", action="store_true", help="2 passages, prompt 32, continuation 8: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    prompt, continuation = (32, 8) if args.quick else (256, 128)
    folder, count = resolve(args.model), 2 if args.quick else args.passages
    passages = read_passages(AutoTokenizer.from_pretrained(folder), count, prompt + continuation + 1)
    model = load(folder)
    settings: dict[str, dict[str, Any]] = {
        'POP, tp_partition="global"': {"ratio": args.ratio, "method": pop_mm.Pop(tp_partition="global")},
        'POP, tp_partition="shard"': {"ratio": args.ratio},
        "thresholds": {"budget": 0.65},
    }
    found: dict[str, list[Any]] = {name: [] for name in settings}
    for ids in passages.values():
        dense = step_logits(model, ids, prompt)
        for name, chosen in settings.items():
            found[name] += score_texts(model, ids, prompt, pop_mm.PopConfig(**chosen, backend="masked"), dense)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    title = f"{args.model}, {os.environ.get('WORLD_SIZE', 1)} processes, ratio {args.ratio}, {len(passages)} passages"
    table = Table("setting", "KL to dense", "same top token", "KL more than together", title=title)
    together = [score.kl for score in found['POP, tp_partition="global"']]
    for name, scores in found.items():
        kl, agreement = ([getattr(score, what) for score in scores] for what in ("kl", "agreement"))
        more = difference(kl, together) if "shard" in name else None
        table.add_row(
            name,
            f"{sum(kl) / len(kl):.5f}",
            f"{sum(agreement) / len(agreement):.3f}",
            "" if more is None else f"{more.value:+.4f} \\[{more.low:+.4f}, {more.high:+.4f}]",
        )
    console.print(table)
    per_passage = {name: list(map(vars, scores)) for name, scores in found.items()}
    save_json(args.json, {"machine": machine, "passages": list(passages), "ratio": args.ratio, "settings": per_passage})


if __name__ == "__main__":
    main()
