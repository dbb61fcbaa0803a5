"""Does a long answer keep what its budget says? The share of the weights that is read, over sampled answers of 1,000 tokens.

    python benchmarks/kept_share.py [--tokens 1000] [--prompt 40 256] [--budget 0.65] [--scope overall] [--answers 4]

A prompt's thresholds serve its whole answer, and activations drift. Prompts are the beginnings of the passages that ship;
the answers are sampled at temperature 1, and cannot end early. *Kept* is the mean over all tokens of the answer; each column
of the table is the mean over the tokens since the column before. Sampling is seeded: answer n has seed n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import pop_mm
from measure import available_cores, load_json, save_json, wide_console
from pop_mm.samples import load, load_passages

TOLERANCE = 0.02  # of the mean over an answer, from the budget
MARKS = 5  # columns of the table


class Marks(BaseStreamer):
    """Looks at the report when the answer has reached certain lengths."""

    def __init__(self, session: Any, lengths: Sequence[int]) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._session = session
        self._lengths = set(lengths)
        self._count = -1  # the first call has the prompt

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with each token."""
        self._count += 1
        if self._count in self._lengths:
            report = self._session.report
            kept = {name: share[1] for name, share in report.kept_share.items()}
            self.found[str(self._count)] = {"all": report.scope_share[1], **kept}

    def end(self) -> None:
        """Nothing is left to do."""


def answer(model: Any, ids: torch.Tensor, tokens: int, seed: int, **settings: Any) -> dict[str, dict[str, float]]:
    """Length of the answer so far -> mean share that was kept, of all weights in scope and by matrix."""
    with pop_mm.prune(model, **settings) as session:
        marks = Marks(session, [tokens * (n + 1) // MARKS for n in range(MARKS)])
        torch.manual_seed(seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,  # the first one is the prefill's
            streamer=marks,
        )
    return marks.found


def windows(means: dict[str, dict[str, float]], name: str) -> list[float]:
    """Means over the tokens between two marks, from the means over all tokens up to each."""
    found, before, total = [], 0, 0.0
    for mark, shares in means.items():
        length = int(mark)
        found.append((shares[name] * length - total) / (length - before))
        before, total = length, shares[name] * length
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a mean is too far from its budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--prompt", type=int, nargs="+", default=[40, 256])
    parser.add_argument("--budget", type=float, nargs="+", default=[0.65])
    parser.add_argument("--scope", choices=["overall", "ffn"], default="overall")
    parser.add_argument("--answers", type=int, default=4, help="each to another passage")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    console = wide_console()
    model, tokenizer = load(args.model)
    passages = list(load_passages().items())
    rows: list[dict[str, Any]] = load_json(args.json) or []
    wanted = [(b, length, seed) for seed in range(args.answers) for b in args.budget for length in args.prompt]
    known = {(row["budget"], row["prompt"], row["seed"]) for row in rows}
    for budget, length, seed in (key for key in wanted if key not in known):
        name, text = passages[seed % len(passages)]
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
        means = answer(model, ids, args.tokens, seed, budget=budget, scope=args.scope)
        rows.append({"budget": budget, "prompt": length, "passage": name, "seed": seed, "means": means})
        console.print(f"{len(rows)} of {len(wanted)} answers: {means[str(args.tokens)]['all']:.4f} of {budget:g}")
        save_json(args.json, rows)
    rows = sorted(rows, key=lambda row: (row["budget"], row["prompt"], row["seed"]))
    marks = list(rows[0]["means"])
    table = Table(title=f"{args.model}, scope {args.scope}: share of the weights that is kept")
    for column in ("budget", "prompt", "passage", "all tokens", *(f"to {mark}" for mark in marks)):
        table.add_column(column, justify="right" if column != "passage" else "left")
    worst = 0.0
    for row in rows:
        mean = row["means"][marks[-1]]["all"]
        worst = max(worst, abs(mean - row["budget"]))
        cells = [f"{mean:.3f}", *(f"{value:.3f}" for value in windows(row["means"], "all"))]
        table.add_row(f"{row['budget']:g}", str(row["prompt"]), row["passage"], *cells)
    console.print(table)
    for name in rows[0]["means"][marks[-1]]:
        if name != "all":
            each = [windows(row["means"], name) for row in rows]
            console.print(
                f"{name}: {', '.join(f'{sum(v) / len(v):.3f}' for v in zip(*each, strict=True))} (mean of all answers)"
            )
    save_json(args.json, rows)
    good = worst <= TOLERANCE
    console.print(
        f"{'PASS' if good else 'FAIL'}  the mean of every answer is within {TOLERANCE} of its budget: {worst:.4f} at most"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
