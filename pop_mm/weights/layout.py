"""How an FFN's channels are stored, and how to narrow or exchange them. The only place that knows about weight layouts.

A channel is one intermediate dimension: an output of the gate and up projections and an input of the down projection.
:class:`Projection` says along which axis of a module's weight the channels lie; :class:`FFN` ties the projections of one
feed-forward network together. Adapters build these records; backends use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import formats
from ..classes import has_own_forward, same_class
from ..errors import AdapterError
from ..formats import Stored
from ..formats.asking import (
    columns,
    device_of,
    is_offloaded,
    is_wide_float,
    known_weight,
    loaded,
    multiplies_with,
    runs_own_forward,
)
from ..formats.norms import weight_norms
from .exchange import ChannelTensor, Matrix, swap_channels
from .shards import Shard, is_spread, local, of_chosen

Role = Literal["dense", "shared_expert"]

# modules whose forward is just x @ W.T + b: these very classes, no subclass
PLAIN_TYPES: tuple[type[nn.Module] | str, ...] = (nn.Linear, "transformers.pytorch_utils:Conv1D")


@dataclass(frozen=True, eq=False)
class Projection:
    """One linear module whose outputs (gate, up) or inputs (down) are an FFN's channels.

    Attributes
    ----------
    name : str
        Qualified name in the model.
    module : nn.Module
        ``nn.Linear``, transformers' ``Conv1D``, or anything that stands in their place (quantised, LoRA-wrapped ...).
    side : {"out", "in"}
        Whether the channels are the module's outputs or its inputs.
    blocks : int
        2 if gate and up are fused, gate rows first.
    transposed : bool
        The weight is stored ``[in, out]`` (Conv1D).
    plain_types : tuple of type or str
        Classes whose forward is just ``x @ W.T + b``, or ``"module:Class"`` for one that is not imported here. Subclasses
        are not plain.
    """

    name: str
    module: nn.Module
    side: Literal["out", "in"]
    blocks: int = 1
    transposed: bool = False
    plain_types: tuple[type[nn.Module] | str, ...] = PLAIN_TYPES

    @property
    def weight(self) -> Tensor:
        """The stored weight."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The stored bias, if any."""
        bias = getattr(self.module, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def axis(self) -> int:
        """Axis of the stored weight along which the channels lie."""
        return int((self.side == "in") != self.transposed)

    def linear_weight(self) -> Tensor:
        """The weight as ``[out, in]``, a view."""
        return self.weight.t() if self.transposed else self.weight

    def features(self, side: Literal["out", "in"]) -> int:
        """Outputs or inputs of the module, also where its weight is packed."""
        for name in (f"{side}_features", "nf" if side == "out" else "nx"):
            if isinstance(declared := getattr(self.module, name, None), int):
                return declared
        weight = getattr(self.module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise AdapterError(
                f"{self.name} is a {type(self.module).__name__}, which says neither {side}_features nor has a weight with "
                "two axes, so its size is unknown. Load the model without quantisation, or give the module that attribute."
            )
        return int(weight.shape[int((side == "in") != self.transposed)])

    def why_not_readable(self) -> str | None:
        """Why the weight does not say by itself what the module computes, or None if it does."""
        module, weight = self.module, getattr(self.module, "weight", None)
        if hasattr(module, "parametrizations"):
            return f"{self.name} is parametrised"
        if not any(same_class(type(module), known) for known in self.plain_types):
            return f"{self.name} is a {type(module).__module__}.{type(module).__name__}"
        if reason := formats.why_not(weight):
            return f"the weight of {self.name} {reason}"
        bias = getattr(module, "bias", None)
        if type(bias) is not nn.Parameter and bias is not None:
            return f"the bias of {self.name} is a {type(bias).__name__}"
        if not runs_own_forward(module) or not has_own_forward(type(module)):
            return f"the forward of {self.name} is replaced"
        return None

    @property
    def stored(self) -> Stored:
        """The tensors behind the weight, for which :meth:`why_not_readable` finds no reason."""
        found = formats.stored(self.weight)
        assert found is not None
        return found

    @property
    def _matrix_and_scale(self) -> tuple[Tensor, Tensor | None]:
        """Of a weight in a form that is known; of what somebody else has made of it, itself."""
        found = formats.stored(self.weight)
        return (self.weight, None) if found is None else (found.matrix, found.scale)

    def why_not_moved(self) -> str | None:
        """Why the tensors behind the weight cannot be stored in another order and the forward replaced, or None if they can."""
        if reason := self.why_not_readable():
            return reason
        if is_offloaded(self.module):
            return f"the weight of {self.name} is offloaded"
        if any(tensor.is_inference() for tensor in self.stored.tensors):
            return f"the weight of {self.name} was made in inference mode"
        if "forward" in self.module.__dict__:
            return f"the forward of {self.name} is replaced"
        return None

    def why_not_plain(self) -> str | None:
        """Why the weight is not floats whose channels can be moved, or None if it is."""
        if reason := self.why_not_moved():
            return reason
        if self.stored.scale is not None:
            return f"the weight of {self.name} is a {type(self.weight).__name__}"
        return None

    def effective_norms(self, dtype: torch.dtype | None, wide: torch.dtype) -> Tensor:
        """Norm of each channel's weights in what the module computes: ``[D]``, ``[2 * D]`` if gate and up are fused.

        Where the weight is not a plain tensor the module is asked (see :func:`pop_mm.formats.asking.columns`), unless it can
        tell. Of a weight that is spread over processes: of this one's part.

        Parameters
        ----------
        dtype : torch.dtype or None
            Of the model's activations.
        wide : torch.dtype
            Of the norms.
        """
        if is_spread(getattr(self.module, "weight", None)):
            return weight_norms(local(self.weight), 1 - self.axis, wide)
        if self.why_not_readable() is None:
            with loaded(self.module):
                stored = self.stored
                matrix = stored.matrix.t() if self.transposed else stored.matrix
                return weight_norms(matrix, 0 if self.side == "in" else 1, wide, stored.scale)
        known = known_weight(self.module)
        if known is not None:
            matrix = known.t() if self.transposed else known
            if multiplies_with(self.name, self.module, matrix, dtype):
                return weight_norms(matrix, 0 if self.side == "in" else 1, wide)
        blocks = columns(self.name, self.module, self.features("in"), dtype, wide)
        if self.side == "in":
            return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks])
        sums: Tensor | float = 0.0
        for block in blocks:
            sums = block.square().sum(0) + sums
        assert isinstance(sums, Tensor)
        return sums.sqrt()

    def narrow_views(self, width: int) -> list[tuple[Tensor, Tensor | None]]:
        """Weight as ``[in, out]`` and bias of the first ``width`` channels, one pair for each block: views."""
        return [(weight, bias) for weight, _, bias in self.narrow_parts(width)]

    def narrow_parts(self, width: int) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
        """:meth:`narrow_views` with the scales of the outputs between the two, of weights that have some."""
        matrix, scale = self._matrix_and_scale
        weight, bias = matrix if self.transposed else matrix.t(), self.bias
        if self.side == "in":
            return [(weight[:width], scale, bias)]
        size = weight.shape[1] // self.blocks
        firsts = [slice(start, start + width) for start in range(0, weight.shape[1], size)]
        return [
            (weight[:, first], None if scale is None else scale[first], None if bias is None else bias[first])
            for first in firsts
        ]

    @torch.inference_mode(False)  # views for forwards of every kind
    @torch.enable_grad()
    def narrow(self, width: int) -> Callable[[Tensor], Tensor]:
        """The module's forward on its first ``width`` channels only, on views of the weight that is stored now.

        The function takes ``[..., in]`` (``[..., width]`` where the channels are the inputs).
        """
        views = self.narrow_views(width)

        def forward(x: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1])
            parts = [linear(rows, w, b) for w, b in views]
            out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            return out.view(*x.shape[:-1], out.shape[-1])

        return forward

    def channel_tensors(self) -> Iterator[ChannelTensor]:
        """The weight, and the bias if it has an entry for every channel."""
        matrix, scale = self._matrix_and_scale
        yield ChannelTensor(f"{self.name}.weight", matrix, lambda tensor, _: self._blocks_of(tensor, self.axis))
        if self.side == "out" and scale is not None:
            yield ChannelTensor(f"{self.name}.weight.scale", scale, lambda tensor, _: self._blocks_of(tensor, 0))
        if self.side == "out" and self.bias is not None:
            yield ChannelTensor(
                f"{self.name}.bias", self.bias, lambda tensor, _: self._blocks_of(tensor.unsqueeze(1), 0)
            )

    def _blocks_of(self, tensor: Tensor, axis: int) -> Iterator[Matrix]:
        for block in tensor.chunk(self.blocks, axis) if self.blocks > 1 else (tensor,):
            yield block, axis


def linear_weight_count(module: nn.Module) -> int:
    """Weights of a linear module, also where it packs them."""
    return Projection("the module", module, "out").features("out") * Projection("", module, "out").features("in")


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows @ weight + bias`` for ``[N, in]`` and ``[in, out]``: the kernel of F.linear with a third of its dispatches."""
    return torch.mm(rows, weight) if bias is None else torch.addmm(bias, rows, weight)


@dataclass(frozen=True, eq=False)
class FFN:
    """One feed-forward network: a dense FFN or a shared expert. Routed experts are :class:`pop_mm.weights.experts.Experts`.

    Attributes
    ----------
    name : str
        Qualified name of the module that holds it.
    layer : int
        Index of the decoder layer.
    inputs : tuple of Projection
        Gate and up, the fused gate-up, or up alone.
    down : Projection
    size : int
        D, the intermediate size.
    role : {"dense", "shared_expert"}
    layout : str
        The layout in words, for the support table and reports.
    holder : nn.Module or None
        The module whose forward is this FFN and nothing else, if there is one.
    activation : nn.Module or None
        Its activation.
    dtype : torch.dtype or None
        Of the activations, where that is known.
    shard : Shard or None
        Of a model that is spread over processes: which of the channels this one has. ``size`` is then how many it chooses among.
    """

    name: str
    layer: int
    inputs: tuple[Projection, ...]
    down: Projection
    size: int
    role: Role = "dense"
    layout: str = ""
    holder: nn.Module | None = None
    activation: nn.Module | None = None
    dtype: torch.dtype | None = None
    shard: Shard | None = None

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections, down last."""
        return (*self.inputs, self.down)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that hold the weights; the last one holds the down projection."""
        return tuple(p.module for p in self.projections)

    @property
    def experts(self) -> int | None:
        """None: there is one of it in a layer."""
        return None

    @property
    def by_input(self) -> dict[str, tuple[nn.Module, ...]]:
        """Modules that are given "x" (gate and up), and "h" (down)."""
        return {"x": tuple(p.module for p in self.inputs), "h": (self.down.module,)}

    @property
    def used(self) -> int:
        """How many of it a token runs."""
        return 1

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """``(D,)``: the shape of anything that is known by channel."""
        return (self.size,)

    @property
    def device(self) -> torch.device:
        """Where the FFN computes."""
        return device_of(self.down.module)

    @property
    def weight_count(self) -> int:
        """Weights of the FFN (of all processes) without biases, from its dimensions: works for packed and offloaded ones too."""
        size = self.size if self.shard is None else self.shard.whole
        return sum(p.blocks * size * self.hidden_size for p in self.projections)

    @property
    def hidden_size(self) -> int:
        """H, the model's hidden size at this FFN."""
        return self.down.features("out")

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of the down projection's weight if that can be computed with, else of the activations, else float32."""
        weight = getattr(self.down.module, "weight", None)
        if isinstance(weight, Tensor) and is_wide_float(weight.dtype):
            return weight.dtype
        return self.dtype or torch.float32

    def why_not_plain(self) -> str | None:
        """The first reason why channels cannot be moved in a projection's weights, or None."""
        return next((reason for p in self.projections if (reason := p.why_not_plain())), None)

    def why_not_moved(self) -> str | None:
        """The first reason why a projection's weights cannot be stored in another order, or None."""
        return next((reason for p in self.projections if (reason := p.why_not_moved())), None)

    def channel_tensors(self) -> list[ChannelTensor]:
        """Every tensor that holds something of each channel."""
        return [tensor for p in self.projections for tensor in p.channel_tensors()]

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Exchange channels of all projections in place (see :func:`swap_channels`): the function stays the same."""
        held = self.channel_tensors()
        swap_channels((matrix for t in held for matrix in t.matrices(t.tensor, None)), first, second)

    @property
    def _norm_dtype(self) -> torch.dtype:
        return torch.promote_types(self.float_dtype, torch.float32)

    @torch.no_grad()
    def input_norms(self) -> Tensor:
        """Norm of each channel's weights in gate and up together, ``[D]``: of what the modules compute."""
        norms = [p.effective_norms(self.dtype, self._norm_dtype).view(p.blocks, -1) for p in self.inputs]
        return of_chosen(self.shard, torch.linalg.vector_norm(torch.cat([n.to(norms[0].device) for n in norms]), dim=0))

    @torch.no_grad()
    def down_column_norms(self) -> Tensor:
        """``||W_down[:, i]||_2``, ``[D]``, in float32 (float64 for float64 weights): of what the module computes."""
        return of_chosen(self.shard, self.down.effective_norms(self.dtype, self._norm_dtype))
