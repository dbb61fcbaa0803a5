"""A mixture of experts, dense and pruned: where the router sends the prompt, and what each expert keeps.

    python demos/moe_generate.py [--model smollm2-mixtral] [--ratio 0.2] [--prompt TEXT]

``--model`` takes a sample's name (``smollm2-mixtral``, ``smollm2-qwen2moe``: SmolLM2-135M with every FFN copied behind a
router, made on first use), a folder, or a hub id such as ``mistralai/Mixtral-8x7B-Instruct-v0.1`` or
``Qwen/Qwen1.5-MoE-A2.7B-Chat``. A picture of the channels and of the routes is saved in ``out/``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from generate_text import ask
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

import pop_mm
from pop_mm.report.tables import answers_table, report_table
from pop_mm.samples import load, load_passages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-mixtral", help="a sample's name, a folder, or a hub id")
    parser.add_argument("--ratio", type=float, default=0.2, help="overall ratio")
    parser.add_argument("--prompt", help="default: a page of Darwin to sum up, so that every expert sees some tokens")
    arguments = parser.parse_args()
    prompt = (
        arguments.prompt or f"{load_passages()['darwin_origin_of_species'][:1500]}\n\nSum this up in two sentences."
    )
    disable_progress_bar()
    console = Console(highlight=False)
    with console.status(f"Loading {arguments.model}"):
        model, tokenizer = load(arguments.model)

    ask(model, tokenizer, "Hi", 4)  # a first call is slower
    answers = {"dense": ask(model, tokenizer, prompt)}
    with pop_mm.prune(model, ratio=arguments.ratio) as session:
        answers[f"pruned {arguments.ratio:.0%}"] = ask(model, tokenizer, prompt)
    console.print(answers_table(answers))
    for part in report_table(session.report):
        console.print(part)
    folder = Path("out")
    folder.mkdir(exist_ok=True)
    console.print(f"Picture: {session.report.plot(folder / 'moe_generate.png')}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except pop_mm.PopError as error:
        sys.exit(f"Error: {error}")
