"""Three prompts, answered by the dense model, with thresholds, and with POP at the same bytes.

    python demos/generate_text.py [--model smollm2-135m] [--budget 0.65]

A token reads all of the layers' weights from the dense model, and ``--budget`` of their bytes with each of the methods. The
first run fetches SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

logging.disable(logging.WARNING)  # of other packages, which say a lot while they are imported

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

import pop_mm
from pop_mm.cli.generate import Clock
from pop_mm.errors import PopWarning
from pop_mm.report.tables import answers_table
from pop_mm.samples import load

# Questions that so small a model can answer; its stories wander when it reads everything, and more when it does not.
PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "What is the capital of France, and what is it known for?",
    "What are the benefits of regular exercise?",
)
METHODS = ("thresholds", "pop")
WIDTH = 100  # columns


@dataclass
class Result:
    """What one setting did: its answers, and how often it chose the dense model's token of the dense answers so far."""

    answers: list[dict[str, Any]] = field(default_factory=list)
    agreed: list[Tensor] = field(default_factory=list)  # of each prompt, a bool for each decode step
    masked: bool = False  # whether anything was read whole though it is left out: no speed-up

    @property
    def agreement(self) -> float:
        """Share of the decode steps."""
        return float(torch.cat(self.agreed).float().mean())


def encode(tokenizer: Any, prompt: str) -> Any:
    chat = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def ask(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64) -> dict[str, Any]:
    """Ask the model, whether it is being pruned at the moment or not; time from the first to the last token."""
    inputs = encode(tokenizer, prompt)
    clock = Clock()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    answer = output[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(answer, skip_special_tokens=True)
    if len(answer) == max_new_tokens:
        text += " ..."
    return {"text": text, "decode_tokens_per_s": clock.decode_tokens_per_s, "ids": output}


@torch.no_grad()
def agreement(model: Any, session: Any, ids: Tensor, prompt_tokens: int) -> Tensor:
    """For each decode step of a text, ``[steps]``: whether the pruned model's likeliest token is the text's next one."""
    with session.split(prompt_tokens):
        logits = model(ids).logits
    return logits[0, prompt_tokens:-1].argmax(-1) == ids[0, prompt_tokens + 1 :]


def run(model: Any, tokenizer: Any, session: Any, dense: Result | None) -> Result:
    """Answer every prompt in one session, or with the dense model; a first call is slower and does not count."""
    result = Result()
    with session or nullcontext():
        ask(model, tokenizer, PROMPTS[0], 4)
        for number, prompt in enumerate(PROMPTS):
            result.answers.append(ask(model, tokenizer, prompt))
            if session and dense:
                length = encode(tokenizer, prompt)["input_ids"].shape[1]
                result.agreed.append(agreement(model, session, dense.answers[number]["ids"], length))
        if session:
            result.masked = any(plan.backend == "masked" for plan in session.plans)
    return result


def measured(results: dict[str, Result], budget: float) -> Table:
    """One row for each setting."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("answers")
    for name in ("layers' bytes read", "decode tokens/s", "speed-up", "same next token"):
        table.add_column(name, justify="right")
    speeds = {name: [answer["decode_tokens_per_s"] for answer in r.answers] for name, r in results.items()}
    timed = [n for n in range(len(PROMPTS)) if all(speed[n] for speed in speeds.values())]  # others are too short
    for name, result in results.items():
        cells = ["-", "-"]
        if timed:
            factor = median(speeds[name][n] / speeds["dense"][n] for n in timed)
            cells = [f"{median(speeds[name][n] for n in timed):.1f}", f"{factor:.2f}x"]
        same = f"{result.agreement:.0%}" if result.agreed else "100%"
        table.add_row(name, f"{1 if name == 'dense' else budget:.0%}", *cells, same)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a sample's name, a folder, or a hub id")
    parser.add_argument("--budget", type=float, default=0.65, help="share of the layers' bytes that a token reads")
    arguments = parser.parse_args()
    disable_progress_bar()
    warnings.simplefilter("ignore", PopWarning)  # that POP breaks at these bytes is what this shows
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    with console.status(f"Loading {arguments.model}"):
        model, tokenizer = load(arguments.model)

    results: dict[str, Result] = {}
    for name in ("dense", *METHODS):
        with console.status(f"Answering: {name}"):
            session = None if name == "dense" else pop_mm.prune(model, budget=arguments.budget, method=name)
            results[name] = run(model, tokenizer, session, results.get("dense"))
    for number, prompt in enumerate(PROMPTS):
        console.print(f"\n{prompt}", style="bold", markup=False)
        console.print(answers_table({name: result.answers[number] for name, result in results.items()}))

    console.print(f"\nMeasured, medians of {len(PROMPTS)} answers (one run each: rough)", style="bold")
    console.print(measured(results, arguments.budget))
    console.print(
        "Same next token: how often a method's likeliest token is the dense model's, after the dense model's own words."
    )
    for name in METHODS:
        if results[name].masked:
            console.print(
                f"With {name} some weights are masked here: the answers are right, but they save no time. The session's "
                "report says why."
            )
    best = max(METHODS, key=lambda name: results[name].agreement)
    console.print(
        f"At the same bytes the method {best!r} stays closest to the dense model here. Use it: "
        f"pop_mm.prune(model, budget={arguments.budget:g}, method={best!r}).",
        style="bold",
    )


if __name__ == "__main__":
    try:
        main()
    except pop_mm.PopError as error:
        sys.exit(f"Error: {error}")
