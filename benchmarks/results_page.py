"""docs/results.md, from the parts that benchmarks/results.py keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pop_mm.evaluation import show
from pop_mm.report.tables import markdown_table

HEAD = """# What pruning costs in quality

<!-- not run: takes an hour -->
```bash
python benchmarks/results.py
```

Written by that command. {machine}. Texts are the passages that ship with pop_mm (public-domain prose); real models of the paper's
sizes cannot be had on this machine, so its tables stand at the end, beside the commands that would run them. For a model of your
own: `pop-mm eval --model ...`.
"""

LEGEND = f"""{show.NOTE} {show.COST} *Minus static*: KL minus that of the prompt's fixed best channels, text by text. `wanda_sp`
(calibrated on the rest of the same passages, which helps it), `magnitude` and `random` prune the same channels for every prompt; as
published they prune the prompt as well, which is *partition* in the column *prefill*. `full` computes everything, and is what the
choice could reach at best.
"""

PAPER = """## Beside the paper

Chen et al. 2026, gamma 0.1, LM-Evaluation-Harness (batch 10) and LMMs-Eval (batch 1). **Not run here**: no such model can be had on this
machine, and there is no GPU. What can be compared is the order: POP above the static mask and below the full choice, and better with
a larger gamma, as above.

Table 2, POP at 0 / 20 / 40 % overall (percent, means over tasks):

| model | question answering | generation | here |
|-|-|-|-|
| Llama-2-7B | 59.70 / 56.78 / 43.95 | 28.69 / 24.12 / 13.84 | not run here |
| Llama-3.1-8B | 64.68 / 59.62 / 49.26 | 44.58 / 37.37 / 23.34 | not run here |
| Qwen3-8B | 65.74 / 61.50 / 50.98 | 60.61 / 56.13 / 42.73 | not run here |

Table 3, mixtures of experts:

| model | question answering | generation | here |
|-|-|-|-|
| Qwen1.5-MoE-A2.7B | 60.21 / 58.40 / 53.95 | 43.17 / 42.10 / 31.11 | not run here |
| Qwen2-57B-A14B | 64.71 / 64.64 / 64.24 | 54.92 / 53.95 / 53.86 | not run here |
| Qwen3-30B-A3B | 66.76 / 64.28 / 54.94 | 57.77 / 57.96 / 38.65 | not run here |

Table 4, vision-language models (mean of POPE F1, OK-VQA, GQA, ScienceQA, MME / 2800):

| model | 0 / 20 / 40 % | here |
|-|-|-|
| Qwen2-VL-7B | 62.14 / 59.94 / 54.33 | not run here |
| Qwen2.5-VL-7B | 60.68 / 59.46 / 54.63 | not run here |

Table 6, 20 %, mean of five generation tasks:

| model | static | POP | full | here |
|-|-|-|-|-|
| Llama-2-7B | 23.40 | 24.12 | 26.56 | not run here |
| Llama-3.1-8B | 34.69 | 37.37 | 38.95 | not run here |

Tables 23 and 24, generation mean at gamma 0.05 / 0.10 / 0.20:

| model | 0.05 / 0.10 / 0.20 | here |
|-|-|-|
| Llama-2-7B | 24.18 / 24.12 / 25.44 | not run here |
| Llama-3.1-8B | 34.26 / 37.37 / 39.83 | not run here |
| Qwen3-8B | 54.61 / 56.13 / 57.67 | not run here |

With a GPU and a hub (`pip install "pop_mm[eval]"`); the dense result of the same run is printed beside each pruned one:

<!-- not run: a model of 8B parameters, and data sets of a hub -->
```bash
python -m pop_mm.evaluation.lm_harness run --model pop --batch_size 10 \\
    --model_args pretrained=meta-llama/Llama-3.1-8B,ratio=0.2,gamma=0.1,prefill=partition,batch=shared,loglikelihood=prefill,dtype=bfloat16 \\
    --tasks boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa,piqa
pop-mm eval --model meta-llama/Llama-3.1-8B --dataset Salesforce/wikitext --subset wikitext-2-raw-v1 \\
    --method static --method pop --method full --ratio 0.2 --ratio 0.4 --prefill partition --batch shared --batch-size 10 --output llama-wikitext
```

More of them, and which tasks they are: [harness.md](harness.md), [harness_vision.md](harness_vision.md).
"""


def write(folder: Path, page: Path, machine: Mapping[str, Any]) -> None:
    """Write the page, and its picture beside it."""
    facts = f"{machine.get('cpu', '')}, {machine.get('threads', '')} threads, torch {machine.get('torch', '')}, float32"
    blocks = [HEAD.format(machine=facts)]
    for name, section in SECTIONS.items():
        file = folder / f"{name}.json"
        blocks.append(section(json.loads(file.read_text()), page) if file.exists() else f"## {name}\n\nNot run.\n")
    page.write_text("\n".join([*blocks, PAPER]))


def _text(found: Mapping[str, Any], page: Path) -> str:
    picture = show.plot(found, page.with_name("results.png"))
    setup = found["setup"]
    equal = [
        [
            f"pop, {e['pop']['ratio']:.0%}, gamma {e['pop']['gamma']:g}",
            *(f"{e[name]['cost']['bytes_share']:.1%}" for name in ("pop", "static")),
            *(f"{e[name]['kl']:.3f} {_pair(e[name]['kl_interval'], '.3f')}" for name in ("pop", "static")),
            _span(e["difference"], "+.4f"),
        ]
        for e in found["equal_cost"]
    ]
    return (
        f"## {setup['model']}: every method\n\n{setup['texts'] and len(setup['texts'])} texts, {setup['prompt']} prompt tokens, "
        f"{setup['continuation']} decode steps scored by teacher forcing, each row pruned by itself.\n\n"
        f"{show.markdown_table(found)}\n\n{LEGEND}\n![KL over bytes read]({picture.name})\n\n{_order(found['order'])}\n"
        "### At equal cost\n\nPOP computes R and C at every step to choose among C. A static mask that simply keeps all of R and C reads "
        "the same. Where *pop - static* is about zero, POP's lead over the static mask of its own ratio (above) comes from the "
        "channels that it computes more, and not from choosing among them.\n\n"
        + _table(["pop", "bytes, pop", "bytes, static", "KL, pop", "KL, static", "pop - static"], equal)
    )


def _order(pairs: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [f"{p['ratio']:.0%}", f"{p['lower']} - {p['higher']}", _span(p["difference"], "+.4f"), _sign(p["difference"])]
        for p in pairs
    ]
    return "Differences of KL, text by text:\n\n" + _table(
        ["ratio", "difference", "KL", "interval excludes zero"], rows
    )


def _sign(interval: Sequence[float]) -> str:
    return "yes" if interval[1] * interval[2] > 0 else "no"


def _outputs(found: Mapping[str, Any], _: Path) -> str:
    generated = found["setup"]["generate"]
    rows = [
        [r["method"], f"{r['ratio']:.0%}", f"{r['same_tokens']:.1f} {_pair(r['same_tokens_interval'], '.1f')}"]
        for r in found["rows"]
        if r["method"] != "dense"
    ]
    return (
        f"## Where greedy outputs part\n\nLeading tokens that are the same as the dense model's, of {generated}; "
        f"{len(found['setup']['texts'])} prompts.\n\n" + _table(["method", "ratio", "same tokens"], rows)
    )


def _batch(found: Mapping[str, Any], _: Path) -> str:
    rows = []
    for alone, shared in zip(found["per_sequence"]["rows"], found["shared"]["rows"], strict=True):
        if alone["method"] != "dense":
            cells = [f"{r['kl']:.3f} {_pair(r['kl_interval'], '.3f')}" for r in (alone, shared)]
            rows.append([alone["method"], f"{alone['ratio']:.0%}", *cells])
    size = found["shared"]["setup"]["batch_size"]
    return (
        f'## Batches\n\nKL to dense when {size} texts have one partition and one choice at every step (`batch="shared"`, the paper; it '
        "is what reads fewer weights), and when each has its own (`per_sequence`).\n\n"
        + _table(["method", "ratio", "per sequence", f"shared by {size}"], rows)
    )


def _moe(found: Mapping[str, Any], _: Path) -> str:
    routed = [[name, _span(value, "+.4f")] for name, value in found["routed_minus"].items()]
    return (
        f"## {found['setup']['model']}: every method, a partition for each expert\n\n{show.markdown_table(found)}\n\n"
        f"{_order(found['order'])}\n`ExpertPolicy(score=\"routed\")` (a token's activations count times the router's weight), minus the plain "
        f"score:\n\n{_table(['method and ratio', 'KL, routed - plain'], routed)}"
    )


def _layers(found: Mapping[str, Any], _: Path) -> str:
    total = sum(found["kl"])
    overall = ", ".join(f"KL {kl:.3f} with {name}" for name, kl in found["overall"].items())
    rows = [[str(i), f"{kl:.4f}", f"{kl / total:.1%}"] for i, kl in enumerate(found["kl"])]
    return (
        f"## Each layer's share\n\nOne layer at a time pruned by {found['ffn_ratio']:.1%} of its FFN (as at 40 % overall; static mask), "
        f"{found['texts']} texts. The sum of the single ones: {total:.3f}. At 40 % overall, the others making up for it: "
        f"{overall} (`layer_ratios={{0: 0.0}}` keeps layer 0 dense).\n\n"
        + _table(["layer", "KL to dense", "share of the sum"], rows)
    )


def _ablations(found: Mapping[str, Any], _: Path) -> str:
    rows = [
        [method, name, _span(f["kl"], ".3f"), "-" if name.startswith("as chosen") else _span(f["minus_chosen"], "+.3f")]
        for method, by_name in found.items()
        for name, f in by_name.items()
    ]
    return (
        "## What the paper leaves open\n\nAt 40 % overall, gamma 0.1, dense prefill: KL of other readings of the score, and their "
        "difference to the one chosen, text by text. None of them is an option of `PopConfig`; a `Scorer` of your own can be any "
        "of them but the rows of gate and up. `delta = gamma` instead of `gamma / 2` is the row with twice the gamma above.\n\n"
        + _table(["method", "score", "KL to dense", "minus chosen"], rows)
    )


def _vision(found: Mapping[str, Any], _: Path) -> str:
    kinds = list(found["rows"][0]["types"])
    rows = []
    for row in found["rows"]:
        cells = [
            f"{100 * t['exact_match']:.0f} [{100 * t['interval'][0]:.0f}, {100 * t['interval'][1]:.0f}]"
            for t in row["types"].values()
        ]
        rows.append([f"{row['ratio']:.0%}" if row["ratio"] else "-", row["method"], *cells, f"{100 * row['mean']:.1f}"])
    count = max(t["n"] for t in found["rows"][0]["types"].values())
    return (
        f"## tiny-vlm: questions about held-out scenes\n\nExact match in percent, greedy, {count} questions of each type (the last two rows of "
        "a ratio: a quarter of them); 95 % intervals (Wilson). More about it: [vlm.md](vlm.md).\n\n"
        + _table(["ratio", "method", *kinds, "mean"], rows)
    )


SECTIONS: dict[str, Callable[[Mapping[str, Any], Path], str]] = {
    "text": _text,
    "outputs": _outputs,
    "batch": _batch,
    "moe": _moe,
    "layers": _layers,
    "ablations": _ablations,
    "vision": _vision,
}


def _span(interval: Sequence[float], form: str) -> str:
    return f"{interval[0]:{form}} {_pair(interval[1:], form)}"


def _pair(interval: Sequence[float], form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(heads, rows) + "\n"
