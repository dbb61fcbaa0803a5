"""Does the text still read well? Repetition, loops and likelihood of what each method writes, beside its speed.

    python benchmarks/generated_text.py [--tokens 256] [--prompts 15] [--prompt-tokens 256] [--json FILE]

The demo's questions and the beginnings of the passages that ship are continued greedily and by sampling (temperature 0.8, top-p
0.95, seeded) by the dense model, with thresholds, and with POP at the same bytes.

- *Repeated 4-grams*: share of an answer's runs of four tokens that stand in it before; prose has few.
- *Loops*: share of the answers in which a piece of at most 40 tokens stands three times in a row; *tokens to it*: mean number of
  tokens before its first repetition, of the answers with a loop.
- *Perplexity*: of the answer by the dense model, given the prompt. Lower is not always better, since what loops is likely too:
  compare it with the dense model's own.
- *Tokens/s* mean something on a quiet machine only.

With ``--json`` an interrupted run goes on from the file, which holds every answer.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers.utils import logging

import pop_mm
from measure import available_cores, load_json, save_json, wide_console
from pop_mm.evaluation.intervals import bootstrap
from pop_mm.report.tables import markdown_table
from pop_mm.samples import load, load_passages

sys.path.insert(0, str(Path(__file__).parents[1] / "demos"))
from generate_text import PROMPTS, encode

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0},
}
LONGEST = 40  # tokens of a piece that may loop
TIMES = 3  # that it stands in a row


def repeated_grams(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the runs of ``size`` tokens that stand earlier in the text; 0 for a text that is too short."""
    grams = [tuple(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def first_loop(tokens: Sequence[int]) -> int | None:
    """Tokens before the first repetition of a piece that stands three times in a row, or None if there is none."""
    found: list[int] = []
    for size in range(1, LONGEST + 1):
        same = 0  # how many tokens in a row are those of ``size`` before
        for at in range(size, len(tokens)):
            same = same + 1 if tokens[at] == tokens[at - size] else 0
            if same == (TIMES - 1) * size:
                found.append(at + 1 - same)
                break
    return min(found, default=None)


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor, prompt: int) -> float:
    """Of what stands behind the prompt, by the model as it is; ``ids`` is ``[1, T]``."""
    logits = model(ids, use_cache=False).logits[0, prompt - 1 : -1].double()
    return math.exp(float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:])))


def write_answer(model: Any, inputs: Any, tokens: int, mode: str, seed: int) -> tuple[Tensor, float]:
    """Prompt and answer, ``[1, T]``, and the seconds that the answer took."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    output: Tensor = model.generate(**inputs, max_new_tokens=tokens, **MODES[mode])
    return output, time.perf_counter() - started


def prompts(tokenizer: Any, tokens: int) -> dict[str, Any]:
    """Name -> what ``generate`` takes: questions and passages in turn."""
    found: dict[str, Any] = {}
    questions, passages = list(PROMPTS), list(load_passages().items())
    while questions or passages:
        if passages:
            name, text = passages.pop(0)
            ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
            found[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if questions:
            question = questions.pop(0)
            found[question] = dict(encode(tokenizer, question))
    return found


def summary(answers: Sequence[dict[str, Any]]) -> list[str]:
    """The figures of one setting and mode."""

    def mean(name: str, form: str) -> str:
        values = [answer[name] for answer in answers]
        found = bootstrap(values)
        return (
            f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"
            if len(values) > 1
            else f"{values[0]:{form}}"
        )

    loops = [answer["loop"] for answer in answers if answer["loop"] is not None]
    log = bootstrap([math.log(answer["perplexity"]) for answer in answers])
    speed = sum(answer["length"] for answer in answers) / sum(answer["seconds"] for answer in answers)
    return [
        mean("length", ".0f"),
        mean("repeated", ".1%"),
        f"{len(loops)} of {len(answers)}",
        f"{sum(loops) / len(loops):.0f}" if loops else "-",
        f"{math.exp(log.value):.2f} [{math.exp(log.low):.2f}, {math.exp(log.high):.2f}]",
        f"{speed:.1f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--prompts", type=int, default=15, help="passages and questions, in turn")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of a passage")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.75, 0.65])
    parser.add_argument("--mode", choices=list(MODES), nargs="+", default=list(MODES))
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    console = wide_console()
    model, tokenizer = load(args.model)
    settings: dict[str, dict[str, Any] | None] = {"dense": None}
    settings |= {f"{m}, {b:g}": {"method": m, "budget": b} for b in args.budget for m in ("thresholds", "pop")}
    asked = dict(list(prompts(tokenizer, args.prompt_tokens).items())[: args.prompts])
    known: list[dict[str, Any]] = load_json(args.json) or []
    done = {(a["prompt"], a["mode"], a["setting"]) for a in known}
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        task = progress.add_task("answering", total=len(asked) * len(args.mode) * len(settings))
        for seed, (name, inputs) in enumerate(asked.items()):
            for setting, own in settings.items():
                modes = [mode for mode in args.mode if (name, mode, setting) not in done]
                with nullcontext() if own is None or not modes else pop_mm.prune(model, **own):
                    written = [(mode, *write_answer(model, inputs, args.tokens, mode, seed)) for mode in modes]
                start = inputs["input_ids"].shape[1]
                for mode, ids, seconds in written:
                    answer = ids[0, start:].tolist()
                    known.append(
                        {
                            "prompt": name,
                            "mode": mode,
                            "setting": setting,
                            "seconds": seconds,
                            "length": len(answer),
                            "text": tokenizer.decode(answer, skip_special_tokens=True),
                            "repeated": repeated_grams(answer),
                            "loop": first_loop(answer),
                            "perplexity": perplexity(model, ids, start),
                        }
                    )
                if written:
                    save_json(args.json, known)
                progress.advance(task, len(args.mode))
    heads = [
        "answers",
        "bytes read by",
        "tokens",
        "repeated 4-grams",
        "loops",
        "tokens to it",
        "perplexity",
        "tokens/s",
    ]
    rows = []
    for mode in args.mode:
        for setting in settings:
            mine = [a for a in known if (a["mode"], a["setting"]) == (mode, setting)]
            rows.append([mode, setting, *summary(mine)])
    console.print(f"{args.model}, {len(asked)} prompts, at most {args.tokens} tokens", highlight=False)
    console.print(markdown_table(heads, rows), highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
