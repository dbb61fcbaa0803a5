"""pop_mm's part of vLLM's ``--additional-config``, and what of vLLM's own settings it has no way for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...errors import ConfigError, EngineError
from ...settings.config import PopConfig

KEY = "pop_mm"
_ONLY = {  # settings that have one value here
    "modality_weights": ({}, "pictures are refused"),
    "prefill": ("dense", "the prompt of each request runs dense"),
    "head_budget": (None, "its lm_head stays dense"),
}


def settings_of(vllm_config: Any) -> PopConfig | None:
    """What ``--additional-config '{"pop_mm": {...}}'`` asks for; None if it has no such key.

    Raises
    ------
    ConfigError
        A setting is unknown, wrong, or one that vLLM's batches have no way for.
    """
    found = vllm_config.additional_config
    if not isinstance(found, Mapping) or KEY not in found:
        return None
    values = found[KEY]
    if not isinstance(values, Mapping):
        raise ConfigError(f"--additional-config: {KEY!r} is an object of settings; got {values!r}.")
    if values.get("batch", "per_sequence") != "per_sequence":
        raise ConfigError(
            "batch='shared' has no meaning in vLLM, whose batch changes from step to step: every request has its own choice. "
            "Leave it out."
        )
    config = PopConfig.from_dict({**values, "batch": "per_sequence"})
    found = {"modality_weights": config.modality_weights, **config.chosen.to_dict()}
    for name, (value, why) in _ONLY.items():
        if found.get(name, value) not in (value, 1):
            raise ConfigError(f"{name}={found[name]!r} cannot be had in vLLM: {why}. Leave it out.")
    if config.backend == "inplace" or config.kernels in ("compiled", "triton"):
        asked = "backend='inplace'" if config.backend == "inplace" else f"kernels={config.kernels!r}"
        raise ConfigError(f"{asked} cannot be had in vLLM, where channels are masked. Leave it out.")
    if config.chosen_method != "thresholds":
        _check_method(config)
    return config


def _check_method(config: PopConfig) -> None:
    method = config.channel_method
    scorer = method.ranks_by().name
    if scorer not in ("wanda", "activation"):
        raise ConfigError(
            f"The scorer {scorer!r} (method={method.name!r}) cannot be had in vLLM, where only 'wanda' and 'activation' are "
            "computed. Use transformers (pop_mm.prune) for it."
        )


def check_engine(vllm_config: Any) -> None:
    """Raise :class:`~pop_mm.errors.EngineError` for what vLLM was asked for and the plug-in has no way for."""
    for what, advice in _unknown(vllm_config):
        raise EngineError(
            f"pop_mm's settings were given, but {what}, which the plug-in has no way for: it would serve something else than was "
            f"asked for, so vLLM does not start. {advice}, or leave pop_mm's settings out."
        )


def _unknown(vllm_config: Any) -> Iterator[tuple[str, str]]:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    if model.runner_type != "generate":
        yield f"the model is for {model.runner_type!r} and decodes nothing", "Serve a model that generates"
    if model.is_multimodal_model:
        yield "the model takes pictures or sounds", "Serve it with transformers"
    if model.is_encoder_decoder:
        yield "the model has an encoder", "Serve it with transformers"
    if vllm_config.quant_config is not None:
        yield f"the weights are quantised ({model.quantization})", "Serve plain weights"
    if vllm_config.lora_config is not None:
        yield "LoRA is enabled", "Merge the adapter into the weights"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding is enabled", "Leave --speculative-config out"
    if vllm_config.kv_transfer_config is not None:
        yield "KV caches come from elsewhere, without the prompt's statistics", "Leave --kv-transfer-config out"
    if vllm_config.device_config.device_type != "cpu" and not model.enforce_eager:
        yield "CUDA graphs may be captured, which cannot hold what each step decides anew", "Use --enforce-eager"
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        yield "some layers see only a part of a prompt's tokens", "Leave --kv-sharing-fast-prefill out"
    if getattr(vllm_config.cache_config, "prefix_match_unit", None) is not None:
        yield (
            "prefixes may end in parts of KV blocks, whose statistics are of whole ones",
            "Leave prefix_match_unit out",
        )
    for name, words in _PARALLEL.items():
        if getattr(parallel, name, 1) > 1:
            yield f"{words} is enabled", "Use tensor parallelism"
    if getattr(parallel, "use_ubatching", False):
        yield "batches run as two halves (DBO)", "Leave --enable-dbo out"


_PARALLEL = {
    "pipeline_parallel_size": "pipeline parallelism",
    "prefill_context_parallel_size": "context parallelism of the prefill",
    "decode_context_parallel_size": "context parallelism of decoding",
    "data_parallel_size": "data parallelism",
}


__all__ = ["KEY", "check_engine", "settings_of"]
