"""Dense decoders. Each class is a row of a table: where the gate, up and down projections of a layer are."""

from __future__ import annotations

from torch import nn

from pop_mm.errors import AdapterError

from .base import Adapter, FFNPaths
from .registry import register_adapter

__all__ = [
    "BloomAdapter",
    "FalconAdapter",
    "FusedGateUpAdapter",
    "GPT2Adapter",
    "GPTNeoXAdapter",
    "Gemma3nAdapter",
    "LlamaAdapter",
    "OPTAdapter",
    "Starcoder2Adapter",
]


@register_adapter(
    "llama",
    "mistral",
    "ministral",
    "ministral3",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "olmo",
    "olmo2",
    "olmo3",
    "smollm3",
    "granite",
    "cohere",
    "cohere2",
    "stablelm",
)
class LlamaAdapter(Adapter):
    """Llama and its kin: ``layers.N.mlp.{gate_proj, up_proj, down_proj}``."""

    ffns = (FFNPaths(),)


@register_adapter("phi3", "glm", "glm4")
class FusedGateUpAdapter(Adapter):
    """Phi-3 and GLM: gate and up in one matrix, gate rows first: ``layers.N.mlp.{gate_up_proj, down_proj}``."""

    ffns = (FFNPaths(gate="gate_up_proj", up="gate_up_proj"),)


@register_adapter("starcoder2")
class Starcoder2Adapter(Adapter):
    """StarCoder 2: ungated ``layers.N.mlp.{c_fc, c_proj}`` with biases."""

    ffns = (FFNPaths(gate="", up="c_fc", down="c_proj"),)


@register_adapter("gpt2")
class GPT2Adapter(Adapter):
    """GPT-2: ungated ``transformer.h.N.mlp.{c_fc, c_proj}``, Conv1D modules that store ``[in, out]``."""

    ffns = (FFNPaths(gate="", up="c_fc", down="c_proj", transposed=True),)


@register_adapter("gpt_neox")
class GPTNeoXAdapter(Adapter):
    """GPT-NeoX and Pythia: ungated ``gpt_neox.layers.N.mlp.{dense_h_to_4h, dense_4h_to_h}``."""

    ffns = (FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h"),)


@register_adapter("falcon")
class FalconAdapter(Adapter):
    """Falcon: ungated ``transformer.h.N.mlp.{dense_h_to_4h, dense_4h_to_h}``, modules of class FalconLinear."""

    ffns = (FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h", plain_types=("FalconLinear",)),)


@register_adapter("bloom")
class BloomAdapter(Adapter):
    """BLOOM: ungated ``transformer.h.N.mlp.{dense_h_to_4h, dense_4h_to_h}``."""

    ffns = (FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h"),)

    def check(self, model: nn.Module) -> None:
        """Refuse the slow-but-exact mode, which reads slices of the weight instead of calling the projection."""
        config = model.config
        if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
            raise AdapterError(
                "BLOOM with slow_but_exact=True slices the down projection by itself, past every hook. Load the model with "
                "slow_but_exact=False."
            )


@register_adapter("opt")
class OPTAdapter(Adapter):
    """OPT: no MLP module; ungated ``model.decoder.layers.N.{fc1, fc2}`` on the layer itself."""

    ffns = (FFNPaths(holder="", gate="", up="fc1", down="fc2"),)


@register_adapter("gemma3n", "gemma3n_text")
class Gemma3nAdapter(Adapter):
    """Gemma 3n is refused: its activation sparsity takes mean and deviation over all gate channels."""

    ffns = (FFNPaths(),)

    @classmethod
    def layout(cls) -> str:
        """The reason instead of a layout."""
        return "refused: its activation sparsity looks at all gate channels"

    def check(self, model: nn.Module) -> None:
        """Always refuse."""
        raise AdapterError(
            "Gemma 3n cuts its gate activations at a threshold that it computes from the mean and deviation of all gate "
            "channels, so leaving channels out would change the ones that stay. pop_mm does not prune it."
        )
