"""``pop-mm ask``: a question about images, answered dense and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ..config import PopConfig
from ..samples import load_vision, resolve
from ..session import prune
from ..tables import answers_table, report_summary
from ..vision import image_token_counts, load_image, prepare
from .generate import Sampling, answer, check_outputs, check_words, find_device, torch_dtype
from .terminal import CommandError, quiet, spinner, write_json

_WARM_UP = 4  # tokens of the answer in a warm-up


def run(
    name: str,
    images: Sequence[str],
    question: str,
    config: PopConfig,
    sampling: Sampling,
    dtype: str,
    device: str,
    json_file: str | None,
    plot: str | None,
) -> None:
    """The command: answer, print, and save where asked. Everything that can be checked early is checked first."""
    check_outputs(json_file, plot)
    check_words("question", question, sampling)
    pictures = [load_image(image) for image in images]
    where, kind = find_device(device), torch_dtype(dtype)
    resolve(name)  # a sample is made here, with its own progress display
    with quiet():
        with spinner(f"Loading {name}"):
            model, processor = load_vision(name, dtype=kind, device=where)
        inputs = prepare(processor, pictures, question, model=model)
        check_context(model, inputs["input_ids"].shape[1], sampling)
        session = prune(model, config)  # first, since it checks that the ratio fits the model
        warm_up(model, inputs)
        dense = answer(model, processor.tokenizer, inputs, sampling, "dense")
        with prune(model, config):
            warm_up(model, inputs)
        with session:
            pruned = answer(model, processor.tokenizer, inputs, sampling, "pruned")
            report = session.report
    console = Console(stderr=json_file == "-")
    answers = {"dense": dense, f"pruned, ratio {config.ratio:g}": pruned}
    console.print(answers_table(answers))
    console.print("Decode speed without prefill, one run each: a rough figure.\n", style="dim")
    console.print(report_summary(report))
    if plot is not None:
        from ..plotting_answer import plot_answer

        saved = plot_answer(report, pictures, question, answers, plot)
        console.print(f"Picture: {saved}", highlight=False, markup=False, soft_wrap=True)
    if json_file is not None:
        asked = {"model": name, "image": list(images), "question": question}
        counts = image_token_counts(processor, inputs)[0]
        result = {**asked, "tokens": counts, "config": config.to_dict(), "dense": dense, "pruned": pruned}
        write_json({**result, "report": report.to_dict()}, json_file)


def check_context(model: PreTrainedModel, tokens: int, sampling: Sampling) -> None:
    """Complain about a prompt that leaves no room for the answer."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and tokens + sampling.max_new_tokens > context:
        raise CommandError(
            f"The prompt has {tokens} tokens (images included) and --max-new-tokens asks for {sampling.max_new_tokens} "
            f"more, but the model's context is {context} tokens. Give a smaller image or ask for fewer tokens."
        )


def warm_up(model: PreTrainedModel, inputs: Any) -> None:
    """Generate a few tokens, so that the costs of a first call do not count against the first answer."""
    torch.manual_seed(0)
    model.generate(**inputs, do_sample=False, num_beams=1, min_new_tokens=_WARM_UP, max_new_tokens=_WARM_UP)
