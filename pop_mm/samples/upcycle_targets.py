"""The model types that ``upcycle`` makes, what each is made from, and its config."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import PopError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache"),
    *("pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
)
_OF_A_CLASS = ("model_type", "architectures", "dtype", "transformers_version", "_name_or_path")  # not carried over


class UpcycleError(PopError):
    """A model cannot be made into the Mixture-of-Experts model that was asked for."""


@dataclass(frozen=True)
class Target:
    """A model type to make.

    Attributes
    ----------
    sources : tuple of str
        Model types whose attention it has.
    expert_count : str
        The setting that holds the number of experts.
    settings : Callable[[PretrainedConfig], dict[str, Any]]
        From the dense config (of the language tower), what the config needs beyond what is carried over.
    window : bool
        Whether its attention has a sliding window, the same in all layers.
    shared : bool
        Whether half of a layer's output comes from a shared expert.
    images : bool
        Whether it is a vision-language model.
    """

    sources: tuple[str, ...]
    expert_count: str
    settings: Callable[[PretrainedConfig], dict[str, Any]]
    window: bool = True
    shared: bool = False
    images: bool = False

    @property
    def layers(self) -> str:
        """Where the decoder's layers are, in the dense model too."""
        return "model.language_model.layers" if self.images else "model.layers"


TARGETS = {
    "mixtral": Target(("llama", "mistral", "qwen2"), "num_local_experts", lambda dense: {}),
    "qwen2_moe": Target(
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
    "qwen3_moe": Target(
        ("qwen3",),
        "num_experts",
        lambda dense: {
            "moe_intermediate_size": dense.intermediate_size,
            "norm_topk_prob": True,
            "attention_bias": dense.attention_bias,
        },
    ),
    "qwen3_vl_moe": Target(
        ("qwen3_vl",),
        "num_experts",  # their weights are always made to sum to 1
        lambda dense: {
            "moe_intermediate_size": dense.intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        images=True,
    ),
}


def _check_source(dense: PretrainedConfig, source: str, to: str) -> None:
    """Raise ``UpcycleError`` unless the target is made from models of this type."""
    target, kind = TARGETS[to], dense.model_type
    known = dict.fromkeys(model_type for each in TARGETS.values() for model_type in each.sources)
    if kind not in known:
        raise UpcycleError(f"The model {source!r} is a {kind}; upcycling takes {', '.join(known)}.")
    if kind not in target.sources:
        fitting = [name for name, each in TARGETS.items() if kind in each.sources]
        if target.images != TARGETS[fitting[0]].images:
            has, lacks = (to, kind) if target.images else (kind, to)
            reason = f"A {has} takes images, a {lacks} takes text alone"
        else:
            has, lacks = (kind, to) if kind == "qwen3" else (to, kind)
            reason = f"The attention of {has} normalises queries and keys, that of {lacks} does not"
        raise UpcycleError(
            f"{reason}: {to} is made from {', '.join(target.sources)}; for {source!r} ({kind}) use {' or '.join(fitting)}."
        )
    if getattr(dense, "quantization_config", None) is not None:
        raise UpcycleError(f"The weights of {source!r} are quantised; give the model that they were made from.")


def target_settings(dense: PretrainedConfig, source: str, to: str, routing: dict[str, Any]) -> dict[str, Any]:
    """Settings of the new config, for ``AutoConfig.for_model``.

    Parameters
    ----------
    dense : PretrainedConfig
    source, to : str
        What the user called the dense model, and a key of ``TARGETS``.
    routing : dict
        Settings that no dense model has: the numbers of experts.

    Raises
    ------
    UpcycleError
        The target is not made from models of this type, or has not their attention.
    """
    _check_source(dense, source, to)
    target = TARGETS[to]
    if target.images:
        parts = {name: _carried(getattr(dense, name)) for name in dense.sub_configs}
        parts["text_config"].update(routing, **target.settings(dense.get_text_config()))
        parts["text_config"]["tie_word_embeddings"] = dense.tie_word_embeddings
        return {**_carried(dense), **parts}
    return {
        **{name: getattr(dense, name) for name in _CARRIED},
        "attention_dropout": dense.attention_dropout or 0.0,
        "head_dim": getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        "rope_parameters": deepcopy(dense.rope_parameters),
        **target.settings(dense),
        **_window(dense, source, to),
        **routing,
    }


def _carried(config: PretrainedConfig) -> dict[str, Any]:
    """Settings that the target has under the same names."""
    return {name: value for name, value in config.to_dict().items() if name not in _OF_A_CLASS}


def _window(dense: PretrainedConfig, source: str, to: str) -> dict[str, Any]:
    """Settings of the sliding window."""
    window = None if dense.model_type == "llama" else dense.sliding_window
    kinds = {"sliding_attention"} if dense.model_type == "mistral" else set(getattr(dense, "layer_types", None) or ())
    if window is not None and "sliding_attention" not in kinds:
        window = None
    if window is not None and not TARGETS[to].window:
        hint = "use mixtral" if len(kinds) == 1 else "no target can have it in some layers only"
        raise UpcycleError(f"The attention of {source!r} has a sliding window, which {to} does not support; {hint}.")
    if window is not None and len(kinds) > 1:
        raise UpcycleError(f"Only some layers of {source!r} have a sliding window; in {to}, all have one or none does.")
    return {"sliding_window": window, **({} if to == "mixtral" else {"use_sliding_window": window is not None})}
