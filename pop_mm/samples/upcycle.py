"""Mixture-of-Experts models made from dense ones ("sparse upcycling", Komatsuzaki et al. 2023, arXiv:2212.05055).

``upcycle("smollm2-135m", "mixtral", "moe")`` copies every FFN of a dense model into experts behind a random router. The
experts' weights in a layer sum to 1, so the model computes what the dense one does, up to rounding, while it routes like
any other of its type. ``perturb`` then makes the experts differ. Of a vision-language model, that is the language tower; all
else is carried over.
"""

from __future__ import annotations

import io
import math
import os
import shutil
import tempfile
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .fetching import _stages, load, load_config, load_vision, resolve, takes_images
from .upcycle_targets import TARGETS, UpcycleError, target_settings

if TYPE_CHECKING:
    from PIL import Image
    from torch import Generator, Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Weights = dict[str, Tensor]

__all__ = ["TEXT", "UpcycleError", "Upcycled", "logit_difference", "upcycle"]

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a"

_PROJECTIONS = ("gate", "up", "down")
_PROCESSOR_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


@dataclass(frozen=True)
class Upcycled:
    """What ``upcycle`` made.

    Attributes
    ----------
    path : Path
        Its folder.
    source_parameters, parameters, active_parameters : int
        Parameters of the dense model, of the new one, and those of the new one that a token uses.
    """

    path: Path
    source_parameters: int
    parameters: int
    active_parameters: int


def upcycle(
    source: str,
    to: str,
    target: str | os.PathLike[str],
    *,
    experts: int = 4,
    top_k: int = 2,
    router_seed: int = 0,
    perturb: float = 0.0,
    progress: bool = True,
) -> Upcycled:
    """Turn a dense model into a Mixture-of-Experts model that computes the same, saved with its tokenizer and processor.

    Parameters
    ----------
    source : str
        A sample's name, a folder or a hub id of a llama, mistral, qwen2, qwen3 or qwen3_vl model. Its dtype is kept.
    to : str
        ``"mixtral"``, ``"qwen2_moe"`` (half of each FFN's output comes from a shared expert), ``"qwen3_moe"`` (from
        qwen3 only: its attention normalises queries and keys), or ``"qwen3_vl_moe"`` (from qwen3_vl only).
    target : path
        The folder to write, which must not exist or be empty.
    experts, top_k : int
        Routed experts of each layer, and how many of them a token uses.
    router_seed : int
        Seed of the routers (normal, logits of about unit variance) and of the noise.
    perturb : float
        Root mean square of the Gaussian noise added to each matrix of each routed expert, relative to the matrix's own.
        Above 0, the model no longer computes what the dense one does.
    progress : bool
        Show the stage (loading, copying, saving) on stderr.

    Raises
    ------
    UpcycleError
        The arguments, the source or the target do not allow it; nothing is written then.
    SampleError
        The source cannot be found or loaded.
    """
    _check_numbers(to, experts, top_k, router_seed, perturb)
    folder = _check_target(target)
    resolve(source, progress=progress)  # a sample is fetched here, before the spinner
    routing = {TARGETS[to].expert_count: experts, "num_experts_per_tok": top_k}
    settings = target_settings(load_config(source), source, to, routing)
    with _stages(f"{source} to {to}", progress) as report, redirect_stderr(io.StringIO()):  # transformers' own bars
        report("loading")
        dense, tokenizer = load(source)
        total = dense.num_parameters()
        moe = _empty(to, settings)
        weights = _take_weights(dense, moe, source, to)
        generation = dense.generation_config
        del dense  # only ``weights`` holds the tensors now, and gives them up one by one
        report("copying")
        _fill(moe, weights, to, router_seed, perturb)
        report("saving")
        try:
            _save(moe, tokenizer, generation, folder, source if TARGETS[to].images else None)
        except OSError as error:
            raise UpcycleError(f"The model could not be saved in {folder}: {error}.") from error
    config = moe.config.get_text_config()
    idle = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers * (experts - top_k)
    return Upcycled(folder, total, moe.num_parameters(), moe.num_parameters() - idle)


def logit_difference(source: str, upcycled: str | os.PathLike[str], text: str | None = None) -> tuple[float, float]:
    """Largest absolute difference between two models' logits on a text, and the first model's largest absolute logit.

    Without a text, ``TEXT`` is taken; vision-language models see a picture before it. The models are loaded one after the
    other.
    """
    import torch

    text = TEXT if text is None else text
    found: list[Tensor] = []
    for name in (source, str(upcycled)):
        with redirect_stderr(io.StringIO()):
            if takes_images(load_config(name)):
                from ..vision import prepare

                model, processor = load_vision(name)
                inputs: Any = prepare(processor, _picture(), text, model=model)
            else:
                model, tokenizer = load(name)
                inputs = {"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]}
        with torch.inference_mode():
            found.append(model(**inputs).logits.float())
        del model
    return float((found[0] - found[1]).abs().max()), float(found[0].abs().max())


def _picture() -> Image.Image:
    """A picture with something to see everywhere, 256 x 256 pixels."""
    from PIL import Image

    line, rings = Image.linear_gradient("L"), Image.radial_gradient("L")
    return Image.merge("RGB", (line, rings, line.transpose(Image.Transpose.ROTATE_90)))


# checks -------------------------------------------------------------------------------------------------------------


def _check_numbers(to: str, experts: int, top_k: int, router_seed: int, perturb: float) -> None:
    if to not in TARGETS:
        hint = "".join(f" Did you mean {near}?" for near in get_close_matches(to.lower().replace("-", "_"), TARGETS, 1))
        raise UpcycleError(f"There is no target {to!r}; the targets are: {', '.join(TARGETS)}.{hint}")
    if experts < 1 or not 1 <= top_k <= experts:
        raise UpcycleError(
            f"A token cannot use {top_k} of {experts} experts: top_k must lie between 1 and the number of experts."
        )
    if router_seed < 0:
        raise UpcycleError(f"The router's seed must not be negative, but is {router_seed}.")
    if not 0 <= perturb < math.inf:
        raise UpcycleError(f"The size of the noise (perturb) must be 0 or a positive number, but is {perturb}.")


def _check_target(target: str | os.PathLike[str]) -> Path:
    """The absolute path, if it does not exist or is an empty folder."""
    folder = Path(target).expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise UpcycleError(f"The target {folder} is a file; give a folder that does not exist yet.")
    if folder.exists() and any(folder.iterdir()):
        raise UpcycleError(f"The target {folder} exists and is not empty; give another folder, or remove it first.")
    return folder


# weights ------------------------------------------------------------------------------------------------------------


def _empty(to: str, settings: dict[str, Any]) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if TARGETS[to].images else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(to, **settings))


def _take_weights(dense: PreTrainedModel, moe: PreTrainedModel, source: str, to: str) -> Weights:
    """The dense model's weights; biases that the target lacks are left out if they are zero, else refused."""
    weights: Weights = dense.state_dict()
    config = dense.config.get_text_config()
    size = dense.dtype.itemsize
    if config.hidden_size * size % 16 or config.intermediate_size * size % 16:
        raise UpcycleError(
            f"The experts of {source!r} would have rows of {config.hidden_size} and {config.intermediate_size} numbers "
            f"of {size} bytes; the kernels that run experts need rows of a multiple of 16 bytes."
        )
    ours = moe.state_dict().keys()
    experts = {f"{name}_proj.weight" for name in _PROJECTIONS}
    lacking = [name for name in weights if name not in ours and name.split(".mlp.")[-1] not in experts]
    if refused := sorted({".".join(name.split(".")[-3:]) for name in lacking if weights[name].any()}):
        raise UpcycleError(f"The model {source!r} has weights that {to} does not have: {', '.join(refused)}.")
    for name in lacking:
        del weights[name]
    return weights


def _fill(moe: PreTrainedModel, weights: Weights, to: str, seed: int, perturb: float) -> None:
    """Give the model its weights, taking them out of ``weights``."""
    import torch

    def random(what: str) -> Generator:  # the routers do not depend on the noise
        return torch.Generator().manual_seed(int.from_bytes(sha256(f"{what} {seed}".encode()).digest()[:8], "big"))

    target, empty, config = TARGETS[to], moe.state_dict(), moe.config.get_text_config()
    routers, noise = random("router"), random("noise")
    experts = getattr(config, target.expert_count)
    for layer in range(config.num_hidden_layers):
        prefix = f"{target.layers}.{layer}.mlp."
        norm = weights[f"{target.layers}.{layer}.post_attention_layernorm.weight"]
        # The FFN's input has about the norm's length, so that logits of such a router have about unit variance.
        router = torch.randn(experts, norm.numel(), generator=routers) / norm.float().norm().clamp(min=1e-6)
        weights[f"{prefix}gate.weight"] = router.to(norm.dtype)
        gate, up, down = (weights.pop(f"{prefix}{name}_proj.weight") for name in _PROJECTIONS)
        # The shared expert makes one half of the output, sigmoid(0), and the routed ones make the other.
        routed = down / 2 if target.shared else down
        weights[f"{prefix}experts.gate_up_proj"] = _copies((gate, up), experts, perturb, noise)
        weights[f"{prefix}experts.down_proj"] = _copies((routed,), experts, perturb, noise)
        if target.shared:
            for name, matrix in zip(_PROJECTIONS, (gate, up, down), strict=True):
                weights[f"{prefix}shared_expert.{name}_proj.weight"] = matrix
            weights[f"{prefix}shared_expert_gate.weight"] = torch.zeros(1, norm.numel(), dtype=norm.dtype)
    for name in empty.keys() - weights.keys():
        if name.endswith("_proj.bias"):
            weights[name] = torch.zeros(empty[name].shape, dtype=norm.dtype)
    moe.load_state_dict(weights, assign=True)
    moe.tie_weights()
    moe.eval()


def _copies(matrices: tuple[Tensor, ...], count: int, perturb: float, noise: Generator) -> Tensor:
    """``count`` copies of matrices put below each other, [count, out, in], each with noise of its own."""
    import torch

    copies = matrices[0].new_empty(count, sum(len(matrix) for matrix in matrices), matrices[0].shape[1])
    for matrix, parts in zip(matrices, copies.split([len(matrix) for matrix in matrices], dim=1), strict=True):
        scale = perturb * matrix.float().square().mean().sqrt()
        for part in parts:
            part.copy_(matrix.float() + scale * torch.randn(matrix.shape, generator=noise) if perturb else matrix)
    return copies


def _save(
    moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: Any, folder: Path, seeing: str | None
) -> None:
    """Write the folder under another name on the same disk and rename it: one of that name is always complete.

    ``seeing`` is the model whose processor's files are copied.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        moe.save_pretrained(made)
        if generation is not None:  # as it is: transformers refuses to save some that it loads
            generation.to_json_file(made / "generation_config.json")
        tokenizer.save_pretrained(made)
        if seeing is not None:
            _copy_processor(seeing, made)
        if folder.exists():
            folder.rmdir()  # empty; renaming onto it does not work everywhere
        made.rename(folder)


def _copy_processor(source: str, folder: Path) -> None:
    """Copy the processor's files as they are, since loading one may need packages that copying it does not."""
    from transformers.utils import cached_file

    where = resolve(source)
    parts = ("missing_entries", "connection_errors")  # the latter is what a missing file is without a network
    optional = {f"_raise_exceptions_for_{part}": False for part in parts}
    for name in _PROCESSOR_FILES:
        if found := cached_file(where, name, **optional):
            shutil.copyfile(found, folder / name)
