"""Mixture-of-Experts models made from dense ones ("sparse upcycling", Komatsuzaki et al. 2023, arXiv:2212.05055).

``upcycle("smollm2-135m", "mixtral", "moe")`` copies every FFN of a dense model into experts behind a random router. The
experts' weights in a layer sum to 1, so the model computes what the dense one does, up to rounding, while it routes like
any other of its type. ``perturb`` then makes the experts differ.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PopError
from .samples import _stages, load, load_config, resolve

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    Weights = dict[str, Tensor]

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a"

_CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
)
_PROJECTIONS = ("gate", "up", "down")


class UpcycleError(PopError):
    """A model cannot be made into the Mixture-of-Experts model that was asked for."""


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


@dataclass(frozen=True)
class _Target:
    """A model type to make.

    Attributes
    ----------
    sources : tuple of str
        Model types whose attention it has.
    expert_count : str
        The setting that holds the number of experts.
    settings : Callable[[PretrainedConfig], dict[str, Any]]
        From the dense config, what the config needs beyond ``_CARRIED``.
    window : bool
        Whether its attention has a sliding window, the same in all layers.
    shared : bool
        Whether half of a layer's output comes from a shared expert.
    """

    sources: tuple[str, ...]
    expert_count: str
    settings: Callable[[PretrainedConfig], dict[str, Any]]
    window: bool = True
    shared: bool = False


_TARGETS = {
    "mixtral": _Target(("llama", "mistral", "qwen2"), "num_local_experts", lambda dense: {}),
    "qwen2_moe": _Target(
        ("llama", "mistral", "qwen2"),
        "num_experts",
        lambda dense: {
            "moe_intermediate_size": dense.intermediate_size,
            "shared_expert_intermediate_size": dense.intermediate_size,
            "norm_topk_prob": True,
            "qkv_bias": True,
        },
        window=False,  # transformers masks it, but does not tell flash attention, which would see all tokens
        shared=True,
    ),
    "qwen3_moe": _Target(
        ("qwen3",),
        "num_experts",
        lambda dense: {
            "moe_intermediate_size": dense.intermediate_size,
            "norm_topk_prob": True,
            "attention_bias": dense.attention_bias,
        },
    ),
}


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
    """Turn a dense model into a Mixture-of-Experts model that computes the same, saved with its tokenizer.

    Parameters
    ----------
    source : str
        A sample's name, a folder or a hub id of a llama, mistral, qwen2 or qwen3 model. Its dtype is kept.
    to : str
        ``"mixtral"``, ``"qwen2_moe"`` (half of each FFN's output comes from a shared expert), or ``"qwen3_moe"`` (from
        qwen3 only: its attention normalises queries and keys).
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
    settings = _settings(load_config(source), source, to)
    settings[_TARGETS[to].expert_count] = experts
    settings["num_experts_per_tok"] = top_k
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
            _save(moe, tokenizer, generation, folder)
        except OSError as error:
            raise UpcycleError(f"The model could not be saved in {folder}: {error}.") from error
    config = moe.config
    idle = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers * (experts - top_k)
    return Upcycled(folder, total, moe.num_parameters(), moe.num_parameters() - idle)


def logit_difference(source: str, upcycled: str | os.PathLike[str], text: str | None = None) -> tuple[float, float]:
    """Largest absolute difference between two models' logits on a text, and the first model's largest absolute logit.

    Without a text, ``TEXT`` is taken. The models are loaded one after the other.
    """
    import torch

    found: list[Tensor] = []
    for name in (source, str(upcycled)):
        with redirect_stderr(io.StringIO()):
            model, tokenizer = load(name)
        with torch.inference_mode():
            found.append(
                model(tokenizer(TEXT if text is None else text, return_tensors="pt")["input_ids"]).logits.float()
            )
        del model
    return float((found[0] - found[1]).abs().max()), float(found[0].abs().max())


# checks -------------------------------------------------------------------------------------------------------------


def _check_numbers(to: str, experts: int, top_k: int, router_seed: int, perturb: float) -> None:
    if to not in _TARGETS:
        hint = "".join(
            f" Did you mean {near}?" for near in get_close_matches(to.lower().replace("-", "_"), _TARGETS, 1)
        )
        raise UpcycleError(f"There is no target {to!r}; the targets are: {', '.join(_TARGETS)}.{hint}")
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


def _settings(dense: PretrainedConfig, source: str, to: str) -> dict[str, Any]:
    """Settings of the new config, but for the number of experts, if the target has the dense model's attention."""
    target, kind = _TARGETS[to], dense.model_type
    known = dict.fromkeys(model_type for each in _TARGETS.values() for model_type in each.sources)
    if kind not in known:
        raise UpcycleError(f"The model {source!r} is a {kind}; upcycling takes {', '.join(known)}.")
    if kind not in target.sources:
        fitting = " or ".join(name for name, each in _TARGETS.items() if kind in each.sources)
        has, lacks = (kind, to) if kind == "qwen3" else (to, kind)
        raise UpcycleError(
            f"The attention of {has} normalises queries and keys, that of {lacks} does not: {to} is made from "
            f"{', '.join(target.sources)}; for {source!r} ({kind}) use {fitting}."
        )
    if getattr(dense, "quantization_config", None) is not None:
        raise UpcycleError(f"The weights of {source!r} are quantised; give the model that they were made from.")
    return {
        **{name: getattr(dense, name) for name in _CARRIED},
        "attention_dropout": dense.attention_dropout or 0.0,
        "head_dim": getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        "rope_parameters": deepcopy(dense.rope_parameters),
        **target.settings(dense),
        **_window(dense, source, to),
    }


def _window(dense: PretrainedConfig, source: str, to: str) -> dict[str, Any]:
    """Settings of the sliding window."""
    window = None if dense.model_type == "llama" else dense.sliding_window
    kinds = {"sliding_attention"} if dense.model_type == "mistral" else set(getattr(dense, "layer_types", None) or ())
    if window is not None and "sliding_attention" not in kinds:
        window = None
    if window is not None and not _TARGETS[to].window:
        hint = "use mixtral" if len(kinds) == 1 else "no target can have it in some layers only"
        raise UpcycleError(f"The attention of {source!r} has a sliding window, which {to} does not support; {hint}.")
    if window is not None and len(kinds) > 1:
        raise UpcycleError(f"Only some layers of {source!r} have a sliding window; in {to}, all have one or none does.")
    return {"sliding_window": window, **({} if to == "mixtral" else {"use_sliding_window": window is not None})}


# weights ------------------------------------------------------------------------------------------------------------


def _empty(to: str, settings: dict[str, Any]) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(to, **settings))


def _take_weights(dense: PreTrainedModel, moe: PreTrainedModel, source: str, to: str) -> Weights:
    """The dense model's weights; biases that the target lacks are left out if they are zero, else refused."""
    weights: Weights = dense.state_dict()
    config = dense.config
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

    target, empty = _TARGETS[to], moe.state_dict()
    routers, noise = random("router"), random("noise")
    experts = getattr(moe.config, target.expert_count)
    for layer in range(moe.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        norm = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
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


def _save(moe: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, generation: Any, folder: Path) -> None:
    """Write the folder under another name on the same disk and rename it: one of that name is always complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        moe.save_pretrained(made)
        if generation is not None:  # as it is: transformers refuses to save some that it loads
            generation.to_json_file(made / "generation_config.json")
        tokenizer.save_pretrained(made)
        if folder.exists():
            folder.rmdir()  # empty; renaming onto it does not work everywhere
        made.rename(folder)
