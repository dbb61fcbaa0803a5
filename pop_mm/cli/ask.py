"""``pop-mm ask``: a question about images, answered dense and pruned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..modality import MODALITIES
from ..report.threshold_report import ThresholdReport
from ..samples import load_vision, resolve
from ..samples.quantise import check_weights
from ..settings.config import PopConfig
from ..vision import load_image, prepare
from .generate import Sampling, check_context, check_outputs, check_words, compare, find_device, torch_dtype
from .terminal import quiet, spinner


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
    weights: str = "auto",
) -> None:
    """The command: answer, print, and save where asked. Everything that can be checked early is checked first."""
    check_outputs(json_file, plot)
    check_words("question", question, sampling)
    check_weights(weights)
    pictures = [load_image(image) for image in images]
    where, kind = find_device(device), torch_dtype(dtype)
    resolve(name)  # a sample is made here, with its own progress display
    with quiet():
        with spinner(f"Loading {name}"):
            model, processor = load_vision(name, dtype=kind, device=where, weights=weights)
        inputs = prepare(processor, pictures, question, model=model)
        length = inputs["input_ids"].shape[1]
        needs = f"The prompt has {length} tokens (images included) and {sampling.asks_for}"
        check_context(model, length + sampling.max_new_tokens, needs, "for fewer tokens, or give a smaller image")
        both = compare(model, processor.tokenizer, inputs, inputs, config, sampling)

    def draw() -> Path:
        from ..report.plotting_answer import plot_answer

        assert plot is not None
        if isinstance(both.report, ThresholdReport):
            return both.report.plot(plot)
        return plot_answer(both.report, pictures, question, both.titled, plot)

    counts = {modality: both.report.modality_tokens.get(modality, 0) for modality in MODALITIES}
    asked = {"model": name, "weight_format": weights, "image": list(images), "question": question, "tokens": counts}
    both.show(asked, json_file, None if plot is None else draw)
