"""How far pruned decoding is from the dense model: KL divergence, argmax agreement and perplexity on real prose.

What is scored, and how: :mod:`pop_mm.evaluation.fidelity`. This is the check that the method does what it should; to
measure a model of your own, use ``pop-mm eval``.

Run: ``python benchmarks/decode_fidelity.py [--passages N] [--ratio R] [--json FILE]``; exit code 1 if a target fails.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import pop_mm
from measure import Verdict, available_cores, machine_facts, print_machine, print_verdicts, wide_console
from pop_mm.evaluation import Score, score_texts, step_logits
from pop_mm.evaluation.fidelity import pruned_step_logits
from pop_mm.evaluation.intervals import Interval, bootstrap
from pop_mm.methods import get_method
from pop_mm.samples import load, load_passages

# what the targets are about; those with figures are for this model, the order of the methods must hold for any
STANDARD_MODEL = "smollm2-135m"
STANDARD = {"ratio": 0.3, "prompt": 256, "continuation": 128, "prefill": "dense"}
STANDARD_PASSAGES = 8
# One forward and single steps round differently, and a near tie between two candidates may fall either way; so that they
# are the same is checked in float64, on a shorter text.
STEP_LOGIT = 1e-9  # largest difference of a logit
STEP_PROMPT, STEP_CONTINUATION = 64, 32


@dataclass(frozen=True)
class Method:
    """A way to choose channels: a variant of the one engine."""

    name: str
    variant: str
    gamma: float = 0.1


METHODS = (
    Method("static", "static"),
    Method("POP gamma 0.1", "pop", 0.1),
    Method("POP gamma 0.2", "pop", 0.2),
    Method("full", "full"),
)


def read_passages(tokenizer: Any, count: int | None, tokens: int) -> dict[str, Tensor]:
    """The first ``tokens`` token ids ``[1, tokens]`` of ``count`` passages that are long enough (None: all)."""
    ids = {name: tokenizer(text, return_tensors="pt").input_ids for name, text in load_passages().items()}
    enough = {name: row[:, :tokens] for name, row in ids.items() if row.shape[1] >= tokens}
    if not enough or (count is not None and len(enough) < count):
        raise SystemExit(
            f"{len(enough)} of {len(ids)} passages have the {tokens} tokens needed; {count or 1} were asked."
        )
    return dict(list(enough.items())[:count])


def config_for(method: Method, ratio: float, prefill: str = "dense", backend: str = "masked") -> pop_mm.PopConfig:
    """The session settings of a method."""
    return pop_mm.PopConfig(
        ratio=ratio,
        scope="ffn",
        method=get_method(method.variant).replace(gamma=method.gamma, prefill=prefill),
        backend=backend,
    )


@torch.no_grad()
def stepwise_logits(model: Any, ids: Tensor, prompt: int, config: pop_mm.PopConfig) -> Tensor:
    """Logits of the scored columns, ``[1, n, V]``, by a prefill and single decode steps on a cache."""
    with pop_mm.prune(model, config):
        cache = model(ids[:, :prompt], use_cache=True).past_key_values
        steps = [
            model(ids[:, column : column + 1], past_key_values=cache, use_cache=True).logits[0, -1]
            for column in range(prompt, ids.shape[1] - 1)
        ]
    return torch.stack(steps).unsqueeze(0)


def score_passage(
    model: Any, ids: Tensor, prompt: int, ratio: float, prefill: str = "dense", methods: Sequence[Method] = METHODS
) -> dict[str, Score]:
    """Scores of the dense model and of every method on one passage."""
    dense = step_logits(model, ids, prompt)
    configs = {"dense": None, **{method.name: config_for(method, ratio, prefill) for method in methods}}
    return {name: score_texts(model, ids, prompt, config, dense)[0] for name, config in configs.items()}


def summarise(scores: Sequence[dict[str, Score]]) -> dict[str, dict[str, Interval | float]]:
    """Over all passages, for every method: ``kl``, ``to_static``, ``agreement`` and ``perplexity``."""

    def column(name: str, field: str) -> Tensor:
        return torch.tensor([getattr(passage[name], field) for passage in scores], dtype=torch.float64)

    static = column("static", "kl")
    return {
        name: {
            "kl": bootstrap(column(name, "kl")),
            "to_static": bootstrap(column(name, "kl"), static),
            "agreement": bootstrap(column(name, "agreement")),
            "perplexity": math.exp(float(column(name, "loss").mean())),
        }
        for name in scores[0]
    }


def verdicts(
    summary: dict[str, Any], cross_check: dict[str, float], standard: bool, standard_model: bool
) -> list[Verdict]:
    """The targets; judged in the standard setting only, and those with figures for the standard model only."""
    pop1, pop2, full = (summary[name] for name in ("POP gamma 0.1", "POP gamma 0.2", "full"))
    targets = [
        (
            f"KL of POP gamma 0.1 is at most 0.85 of static: {pop1['to_static'].value:.3f}",
            pop1["to_static"].value <= 0.85,
        ),
        (
            f"KL of POP gamma 0.2 is below gamma 0.1: {pop2['kl'].value:.3f} < {pop1['kl'].value:.3f}",
            pop2["kl"].value < pop1["kl"].value,
        ),
        (f"KL of full is at most 0.05 of static: {full['to_static'].value:.4f}", full["to_static"].value <= 0.05),
    ]
    result = [Verdict(text, passed if standard and standard_model else None) for text, passed in targets]
    kl = [summary[method.name]["kl"].value for method in METHODS]
    order = f"KL falls from {' to '.join(method.name for method in METHODS)}: {' > '.join(f'{k:.4f}' for k in kl)}"
    result.append(Verdict(order, kl == sorted(kl, reverse=True) if standard else None))
    for backend, found in cross_check.items():
        text = (
            f"one forward equals single decode steps in float64 ({backend}): largest difference of a logit "
            f"{found:.1e} (target {STEP_LOGIT:g})"
        )
        result.append(Verdict(text, found <= STEP_LOGIT))
    return result


def show(console: Console, summary: dict[str, Any], title: str) -> None:
    """The table."""
    table = Table(title=title, caption="in brackets: 95 %, paired bootstrap over passages")
    table.add_column("method", no_wrap=True)
    for name in ("KL to dense, nats/token", "relative to static", "argmax agreement", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summary.items():

        def cell(key: str, digits: int, row: dict[str, Any] = row) -> str:
            value = row[key]
            return f"{value.value:.{digits}f} \\[{value.low:.{digits}f}, {value.high:.{digits}f}]"

        digits = 4 if row["kl"].value < 0.05 else 3
        ratio = cell("to_static", digits) if math.isfinite(row["to_static"].value) else "-"
        figures = ("-", "-", "-") if name == "dense" else (cell("kl", digits), ratio, cell("agreement", 3))
        table.add_row(name, *figures, f"{row['perplexity']:.2f}")
    console.print(table)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=STANDARD_MODEL, help="sample name, folder or hub id")
    parser.add_argument("--passages", type=int, help="how many passages (default: all)")
    parser.add_argument("--prompt", type=int, help="prompt tokens (256)")
    parser.add_argument("--continuation", type=int, help="decode steps (128)")
    parser.add_argument("--ratio", type=float, default=STANDARD["ratio"], help="share of each FFN left out")
    parser.add_argument("--prefill", choices=("dense", "partition"), default=STANDARD["prefill"])
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="2 passages, prompt 32, continuation 8: does it run?")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    for name, quick in (("passages", 2), ("prompt", 32), ("continuation", 8)):
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else STANDARD.get(name))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    model, tokenizer = load(args.model)
    passages = read_passages(tokenizer, args.passages, args.prompt + args.continuation + 1)
    scores = {}
    with Progress(console=Console(file=sys.stderr), transient=True) as progress:
        for name, ids in progress.track(passages.items(), description="passages"):
            scores[name] = score_passage(model, ids, args.prompt, args.ratio, args.prefill)
        cross_check = check_steps(model, next(iter(passages.values())), args)
    summary = summarise(list(scores.values()))
    title = (
        f"{args.model}, {args.ratio:.0%} of each FFN left out, {args.prefill} prefill: {len(passages)} passages, "
        f"{args.prompt} prompt tokens, {args.continuation} decode steps scored"
    )
    show(console, summary, title)
    standard = len(passages) >= STANDARD_PASSAGES and all(getattr(args, k) == v for k, v in STANDARD.items())
    found = verdicts(summary, cross_check, standard, args.model == STANDARD_MODEL)
    if args.json:
        result = {
            "machine": machine,
            "settings": {key: getattr(args, key) for key in ("model", *STANDARD)} | {"passages": list(passages)},
            "methods": {
                name: {k: v.to_list() if isinstance(v, Interval) else v for k, v in row.items()}
                for name, row in summary.items()
            },
            "per_passage": {name: {m: vars(s) for m, s in row.items()} for name, row in scores.items()},
            "cross_check": cross_check,
            "verdicts": [verdict.to_dict() for verdict in found],
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return print_verdicts(console, found)


def check_steps(model: Any, ids: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """Compare one forward with single steps in float64, for POP gamma 0.1, on the masked and the in-place backend.

    The model is in float64 afterwards, and its experts (which have no other kernel for it) run eagerly.
    """
    prompt = min(args.prompt, STEP_PROMPT)
    ids = ids[:, : prompt + min(args.continuation, STEP_CONTINUATION) + 1]
    model.double()
    if "grouped_mm" in model.get_experts_implementation().values():
        model.set_experts_implementation("eager")
    settings = METHODS[1], args.ratio, args.prefill
    whole, _ = pruned_step_logits(model, ids, prompt, config_for(*settings))
    found = {}
    for backend in ("masked", "auto"):
        steps = stepwise_logits(model, ids, prompt, config_for(*settings, backend=backend))
        found[backend] = float((whole - steps).abs().max())
    return found


if __name__ == "__main__":
    sys.exit(main())
