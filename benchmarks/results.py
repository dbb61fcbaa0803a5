"""Everything in docs/results.md: quality by method, ratio and gamma on the models that can be had without a hub.

Parts, each kept in ``out/results`` so that an interrupted run goes on: ``text`` (SmolLM2-135M, every method), ``outputs``
(greedy outputs), ``batch`` (ten texts with one partition), ``moe`` (its upcycled mixture), ``layers`` (each layer's share of the
loss), ``ablations`` (choices that the paper leaves open) and ``vision`` (tiny-vlm). The page is written from all parts that are
there.

Run: ``python benchmarks/results.py [--only PART ...] [--quick]``; exit code 1 if the order of the methods is not as it must be.
About an hour on 2 cores, without other work beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from results_page import write
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import pop_mm
from measure import (
    Verdict,
    available_cores,
    load_json,
    machine_facts,
    print_machine,
    print_verdicts,
    save_json,
    wide_console,
)
from pop_mm.adapters import adapter_for
from pop_mm.evaluation import METHODS, config_for, score_texts, step_logits, texts
from pop_mm.evaluation.intervals import bootstrap, difference
from pop_mm.evaluation.run import Point, Run, Setup, grid
from pop_mm.methods.fixed import FixedScorer
from pop_mm.methods.scoring import ActivationScorer, WandaScorer
from pop_mm.samples import load, load_passages

ROOT = Path(__file__).parents[1]
RATIOS, GAMMAS = (0.2, 0.4), (0.05, 0.1, 0.2)


class Parts:
    """The parts of the page, as JSON in one folder."""

    def __init__(self, folder: Path, quick: bool, model: str, moe: str) -> None:
        self.folder = folder
        self.quick = quick
        self.models = {"text": model, "moe": moe}
        self._loaded: tuple[str, Any] | None = None

    def model(self, name: str) -> tuple[Any, Any]:
        """Model and tokenizer; one at a time in memory."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None
            self._loaded = name, load(name)
        return self._loaded[1]

    def run(self, part: str, name: str, limit: int | None = None, **settings: Any) -> Run:
        """A run of the evaluation on the passages that ship with pop_mm."""
        model, tokenizer = self.model(name)
        small = {"prompt": 32, "continuation": 8, "generate": 4} if self.quick else {}
        setup = Setup(name, **{**settings, **{k: v for k, v in small.items() if settings.get(k, 1)}})
        passages = load_passages()
        cut = texts.windows(passages, tokenizer, setup.tokens, 2 if self.quick else limit)
        whole = Setup(name).tokens
        rest = texts.pieces(passages, tokenizer, whole)
        calibration = [w for w in rest if len(w.ids) < whole]  # what follows the windows, at any size of theirs
        return Run(model, setup, [w for w in cut if "#" not in w.name], calibration, self.folder / part)

    def save(self, part: str, result: Any) -> None:
        """Keep a part."""
        save_json(self.folder / f"{part}.json", result)


def text_points(prefills: Sequence[str] = ("dense", "partition")) -> list[Point]:
    """Every method; with the paper's prefill POP at gamma 0.1 alone."""
    points = grid(list(METHODS), RATIOS, GAMMAS, prefills)
    return [p for p in points if p.prefill == "dense" or p.gamma in (None, 0.1)]


def text(parts: Parts, progress: Progress) -> None:
    """Every method on SmolLM2-135M."""
    run, points = parts.run("text", parts.models["text"], generate=0), text_points()
    _work(run, points, "text", progress)
    pairs = equal_cost(run)
    _work(run, list(pairs.values()), "text, static masks at pop's cost", progress)
    rows = run.results([*pairs, *pairs.values()])["rows"]
    equal = [
        {"pop": pop, "static": static, "difference": difference(run.values(a, "kl"), run.values(b, "kl")).to_list()}
        for (a, b), pop, static in zip(pairs.items(), rows[: len(pairs)], rows[len(pairs) :], strict=True)
    ]
    parts.save("text", {**run.results(points), "order": order(run), "equal_cost": equal})


def equal_cost(run: Run) -> dict[Point, Point]:
    """POP, and the static mask that keeps all of POP's R and C at every step: it reads the same, and has no choice to make."""
    adapter = adapter_for(run.model)
    weights = adapter.layer_weights(run.model, adapter.projections(run.model)).values()
    share = sum(w.ffn for w in weights) / sum(w.ffn + w.attention for w in weights)
    pops = [Point("pop", ratio, gamma) for ratio in RATIOS for gamma in GAMMAS]
    return {p: Point("static", round(p.ratio - p.gamma / 2 * share, 6)) for p in pops if p.ratio and p.gamma}


def outputs(parts: Parts, progress: Progress) -> None:
    """Where greedy outputs part from the dense model's, on some of the texts."""
    run = parts.run("outputs", parts.models["text"], limit=4, generate=16)
    points = grid(["static", "pop", "full"], RATIOS, [0.1], ["dense"])
    _work(run, points, "outputs", progress)
    parts.save("outputs", run.results(points))


def batch(parts: Parts, progress: Progress) -> None:
    """Ten texts with one partition and one choice a step, beside the same ten each with its own."""
    points = grid(["static", "pop"], RATIOS, [0.1], ["dense"])
    found = {}
    for kind in ("per_sequence", "shared"):
        run = parts.run(
            f"batch-{kind}", parts.models["text"], limit=10, generate=0, batch=kind, batch_size=5 if parts.quick else 10
        )
        _work(run, points, f"batch, {kind}", progress)
        found[kind] = run.results(points)
    parts.save("batch", found)


def moe(parts: Parts, progress: Progress) -> None:
    """Every method on the mixture, and scores that take the router's weight."""
    name = parts.models["moe"]
    run, points = parts.run("moe", name, limit=8, generate=0), text_points(["dense"])
    _work(run, points, "moe", progress)
    routed = parts.run("moe-routed", name, limit=8, generate=0, settings={"expert_score": "routed"})
    some = [Point("dense"), *(Point("static", r) for r in RATIOS), *(Point("pop", r, 0.1) for r in RATIOS)]
    _work(routed, some, "moe, routed scores", progress)
    apart = {
        f"{p.method} {p.ratio:.0%}": difference(routed.values(p, "kl"), run.values(p, "kl")).to_list() for p in some[1:]
    }
    parts.save(
        "moe", {**run.results(points), "order": order(run), "routed": routed.results(some), "routed_minus": apart}
    )


def layers(parts: Parts, progress: Progress) -> None:
    """KL when a single layer is pruned, as much as at 40 % overall."""
    model, tokenizer = parts.model(parts.models["text"])
    prompt, ids = _ids(parts, tokenizer, 2)
    ratio = pop_mm.session.session.plan_ffns(model, pop_mm.PopConfig(0.4))[0].ratio
    dense = step_logits(model, ids, prompt)
    count = model.config.num_hidden_layers
    found = []
    for layer in progress.track(range(count), description="layers"):
        config = config_for("static", 0.0, scope="ffn", layer_ratios={layer: ratio})
        found.append(sum(score.kl for score in score_texts(model, ids, prompt, config, dense)) / len(ids))
    worst = max(range(count), key=found.__getitem__)
    spared = {}
    for name, kept in (("all layers", {}), (f"layer {worst} dense", {worst: 0.0})):
        config = config_for("static", 0.4, layer_ratios=kept)  # the other layers make up for it, if there are enough
        with suppress(pop_mm.ConfigError):
            spared[name] = sum(score.kl for score in score_texts(model, ids, prompt, config, dense)) / len(ids)
    parts.save("layers", {"ffn_ratio": ratio, "texts": len(ids), "kl": found, "overall": spared})


def ablations(parts: Parts, progress: Progress) -> None:
    """Choices that the paper leaves open, at 40 % overall: KL of each, and its difference to the one chosen."""
    model, tokenizer = parts.model(parts.models["text"])
    prompt, ids = _ids(parts, tokenizer, 6)
    kl: dict[str, dict[str, list[float]]] = {"static": {}, "pop": {}}
    tasks = [(name, method) for name in SCORERS for method in (("static",) if name in ROWS else ("static", "pop"))]
    for name, method in progress.track(tasks, description="ablations"):
        values: list[float] = []
        for row in ids.split(1):  # one at a time: where the score comes from gate and up, each text has its own scorer
            scorer = SCORERS[name](model, row[:, :prompt])
            values.append(score_texts(model, row, prompt, config_for(method, 0.4, scorer=scorer))[0].kl)
        kl[method][name] = values
    chosen = next(iter(SCORERS))
    parts.save(
        "ablations",
        {
            method: {
                name: {"kl": bootstrap(values).to_list(), "minus_chosen": difference(values, found[chosen]).to_list()}
                for name, values in found.items()
            }
            for method, found in kl.items()
        },
    )


def vision(parts: Parts, progress: Progress) -> None:
    """Answers of tiny-vlm: the benchmark of its own."""
    target = parts.folder / "vision.json"
    sizes = ["--quick"] if parts.quick else ["--per-type", "50", "--batch", "100"]
    script = Path(__file__).with_name("vlm_accuracy.py")
    progress.stop()
    subprocess.run([sys.executable, str(script), *sizes, "--json", str(target)], check=False)


# ablations: other scores -----------------------------------------------------------------------------------------------


class WithoutFirstToken(WandaScorer):
    """The prompt's first token does not count."""

    def prompt_activations(self, h: Tensor) -> Tensor:
        """Zero at the first position of a prompt ``[B, q, D]``."""
        return torch.cat([torch.zeros_like(h[:, :1]), h[:, 1:]], 1)


class TokenNorms(WandaScorer):
    """Every token counts the same, however large its activations."""

    def prompt_activations(self, h: Tensor) -> Tensor:
        """Normalised for each token."""
        return torch.nn.functional.normalize(h, dim=-1)


class FromInputs(FixedScorer):
    """Wanda's score on rows of gate and up: ``||W[i, :] * ||x||_2||_2`` of the FFN's input x over one prompt."""

    name = "rows"

    @torch.no_grad()
    def __init__(self, model: Any, prompt: Tensor, projections: Sequence[str]) -> None:
        self._scores: dict[str, Tensor] = {}
        energies: dict[str, Tensor] = {}
        plans = pop_mm.session.session.plan_ffns(model, pop_mm.PopConfig(0.4))

        def look(name: str) -> Callable[..., None]:
            def hook(_: Any, args: tuple[Tensor, ...]) -> None:
                energies[name] = args[0].flatten(0, -2).square().sum(0)

            return hook

        hooks = [p.ffn.inputs[0].module.register_forward_pre_hook(look(p.ffn.name)) for p in plans]
        try:
            model(prompt, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for plan in plans:
            used = [p for p in plan.ffn.inputs if p.name.rsplit(".", 1)[-1] in projections]
            squared = [(p.linear_weight().square() * energies[plan.ffn.name]).sum(1) for p in used]
            self._scores[plan.ffn.name] = torch.stack(squared).sum(0).sqrt()

    def channel_weight(self, ffn: Any) -> Tensor:
        """``[D]``."""
        return self._scores[ffn.name]


ROWS = {"score from rows of up": ["up_proj"], "score from rows of gate and up": ["gate_proj", "up_proj"]}
SCORERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "as chosen: ||W_down[:, i]|| x ||h_i||": lambda *_: WandaScorer(),
    "without the weights' norms": lambda *_: ActivationScorer(),
    "without the first token": lambda *_: WithoutFirstToken(),
    "norms of each token first": lambda *_: TokenNorms(),
    **{name: lambda model, prompt, used=used: FromInputs(model, prompt, used) for name, used in ROWS.items()},
}


# order of the methods --------------------------------------------------------------------------------------------------


def order(run: Run) -> list[dict[str, Any]]:
    """At each ratio: full <= pop <= static, and pop by gamma; the mean difference of KL and its interval."""
    found = []
    for ratio in RATIOS:
        pops = [Point("pop", ratio, gamma) for gamma in GAMMAS]
        chain = [Point("static", ratio), *pops, Point("full", ratio)]
        pairs = [
            *zip(chain[1:], chain, strict=False),
            *((p, chain[0]) for p in pops[1:]),
            *((chain[-1], p) for p in pops[:-1]),
        ]
        for lower, higher in pairs:
            interval = difference(run.values(lower, "kl"), run.values(higher, "kl"))
            found.append(
                {"ratio": ratio, "lower": _name(lower), "higher": _name(higher), "difference": interval.to_list()}
            )
    return found


def _name(point: Point) -> str:
    return point.method if point.gamma is None else f"{point.method} {point.gamma:g}"


def verdicts(parts: Parts) -> list[Verdict]:
    """Each difference has the sign that it must have, and its interval excludes zero."""
    found = []
    for part in ("text", "moe"):
        for pair in (load_json(parts.folder / f"{part}.json") or {"order": []})["order"]:
            mean, low, high = pair["difference"]
            words = f"{part}, {pair['ratio']:.0%}: KL of {pair['lower']} is below {pair['higher']}: "
            found.append(Verdict(f"{words}{mean:+.4f} [{low:+.4f}, {high:+.4f}]", None if parts.quick else high < 0))
    return found


def _work(run: Run, points: Sequence[Point], name: str, progress: Progress) -> None:
    task = progress.add_task(name, total=run.total(points))
    run.work(points, lambda: progress.advance(task))


def _ids(parts: Parts, tokenizer: Any, limit: int | None = None) -> tuple[int, Tensor]:
    """Prompt tokens, and token ids of the passages."""
    setup = Setup("", prompt=32, continuation=8) if parts.quick else Setup("")
    cut = texts.windows(load_passages(), tokenizer, setup.tokens, 2 if parts.quick else limit)
    return setup.prompt, torch.stack([window.ids for window in cut if "#" not in window.name])


PARTS: dict[str, Callable[[Parts, Progress], None]] = {
    "text": text,
    "moe": moe,
    "ablations": ablations,
    "batch": batch,
    "layers": layers,
    "outputs": outputs,
    "vision": vision,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what was asked for and write the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=list(PARTS), nargs="*", metavar="PART", default=list(PARTS), help="none: the page alone"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "out" / "results", help="where parts are kept")
    parser.add_argument("--page", type=Path, help="the page (docs/results.md; with --quick in --output)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--moe", default="smollm2-mixtral")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--quick", action="store_true", help="two short texts: does it run?")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console, machine = wide_console(), machine_facts()
    print_machine(console, machine)
    parts = Parts(args.output, args.quick, args.model, args.moe)
    for name in args.only:
        with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
            PARTS[name](parts, progress)
    page = args.page or (args.output / "results.md" if args.quick else ROOT / "docs" / "results.md")
    write(args.output, page, machine)
    console.print(f"Written: {page}", highlight=False, soft_wrap=True)
    return print_verdicts(console, verdicts(parts))


if __name__ == "__main__":
    sys.exit(main())
