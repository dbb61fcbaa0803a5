"""Three prompts, answered by the dense model and by the same model pruned at an overall 20 % and 40 %.

    python demos/generate_text.py [--model smollm2-135m]

The first run fetches SmolLM2-135M-Instruct. A picture of the last answer's channels is saved in ``out/``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from transformers.utils import logging

import pop_mm
from pop_mm.cli.generate import Clock
from pop_mm.samples import load
from pop_mm.tables import answers_table, report_summary

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and her cat.",
    "Give me three tips for learning a new language.",
)
RATIOS = (0.2, 0.4)


def ask(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64) -> dict[str, Any]:
    """Ask the model, whether it is being pruned at the moment or not; time from the first to the last token."""
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    clock = Clock()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=clock)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"text": text, "decode_tokens_per_s": clock.decode_tokens_per_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a sample's name, a folder, or a hub id")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(highlight=False)
    with console.status(f"Loading {arguments.model}"):
        model, tokenizer = load(arguments.model)

    ask(model, tokenizer, "Hi", 4)  # a first call is slower
    speeds: dict[str, list[float]] = {}  # tokens per second of each prompt's answer
    for prompt in PROMPTS:
        answers = {"dense": ask(model, tokenizer, prompt)}
        for ratio in RATIOS:
            with pop_mm.prune(model, ratio=ratio) as session:
                answers[f"pruned {ratio:.0%}"] = ask(model, tokenizer, prompt)
        console.print(f"\n{prompt}", style="bold")
        console.print(answers_table(answers))
        if all(answer["decode_tokens_per_s"] for answer in answers.values()):  # else one is too short to time
            for name, answer in answers.items():
                speeds.setdefault(name, []).append(answer["decode_tokens_per_s"])

    console.print(
        "\nDecode speed, medians of the three answers (rough; benchmarks/decode_speed.py is exact)", style="bold"
    )
    for name, values in speeds.items():
        factor = median(own / dense for own, dense in zip(values, speeds["dense"], strict=True))
        console.print(f"  {name:12} {median(values):6.1f} tokens/s  {factor:.2f}x")
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    console.print("\nThe last session", style="bold")
    console.print(report_summary(session.report))
    console.print(f"Picture of its channels: {session.report.plot(folder / 'generate_text.png')}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except pop_mm.PopError as error:
        sys.exit(f"Error: {error}")
