"""How the routed experts of a layer are stored, and how to narrow or move their channels: 3-D tensors, one slice an expert.

The counterpart of :mod:`pop_mm.weights.layout` for modules that transformers dispatches through its ``ExpertsInterface``. What
the layout is, the module says itself: ``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ..formats.asking import device_of, is_offloaded, is_wide_float, loaded, runs_own_forward
from ..formats.norms import weight_norms
from ..kernels import Rows, View, rows_of
from .exchange import ChannelTensor, Matrix, swap_channels
from .shards import Shard, is_spread, local, of_chosen

LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True, eq=False)
class ExpertViews:
    """Weights of some channels of one expert, each as ``[in, out]`` with its bias.

    Attributes
    ----------
    inputs : list
        Gate and up; their outputs one behind the other are what the module's ``_apply_gate`` takes.
    down : tuple
    """

    inputs: list[View]
    down: View

    @cached_property
    def rows(self) -> tuple[Rows, Rows] | None:
        """The same for the compiled kernel, if that can read them."""
        return rows_of(self.inputs, self.down)


@dataclass(frozen=True, eq=False)
class Experts:
    """All routed experts of one layer.

    Attributes
    ----------
    name : str
        Qualified name of the module.
    layer : int
        Index of the decoder layer.
    module : nn.Module
        Takes ``(hidden [T, H], top_k_index [T, k], top_k_weights [T, k])`` through transformers' ExpertsInterface.
    top_k : int
        Experts that a token is routed to.
    layout : str
        The layout in words.
    shard : Shard or None
        Of a model that is spread over processes: which of the channels, or with expert parallelism all channels of some experts.
    """

    name: str
    layer: int
    module: nn.Module
    top_k: int
    layout: str = ""
    role: Literal["expert"] = "expert"
    shard: Shard | None = None

    @property
    def count(self) -> int:
        """E, the experts that this module holds (under expert parallelism, those of this rank)."""
        return int(local(self.down).shape[0])

    @property
    def experts(self) -> int | None:
        """E, as :attr:`count`: what tells experts from a dense FFN."""
        return self.count

    @property
    def by_input(self) -> dict[str, tuple[nn.Module, ...]]:
        """The module that is given "x", and "h" between its projections."""
        return {"x": (self.module,), "h": (self.module,)}

    @property
    def used(self) -> int:
        """k, the experts that a token runs."""
        return self.top_k

    @property
    def size(self) -> int:
        """D, the intermediate size of one expert (of a spread model, what this process chooses among)."""
        return self.shard.channels if self.shard is not None else int(self.down.shape[self.channel_axis])

    @property
    def held(self) -> int:
        """Channels of an expert that this process has."""
        if self.shard is None:  # compiled steps come here, and cannot look at classes
            return self.size
        return int(local(self.down).shape[self.channel_axis])

    @property
    def channel_axis(self) -> int:
        """Axis of :attr:`down` along which the channels lie."""
        return 1 if self._transposed else 2

    @property
    def hidden_size(self) -> int:
        """H, what an expert takes and returns."""
        return int(self.down.shape[2 if self._transposed else 1])

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """``(E, D)``: the shape of anything that is known by channel."""
        return self.count, self.size

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The modules that hold the weights; the last one holds the down projections."""
        return (self.module,)

    @property
    def weight_count(self) -> int:
        """Weights that a token reads: those of its top-k experts, without biases."""
        inputs, down = self._parameter(self.input_name), self.down
        return self.top_k * ((inputs.numel() + down.numel()) // int(down.shape[0]))

    @property
    def float_dtype(self) -> torch.dtype:
        """Dtype of the weights if it is a float, else float32."""
        return self.down.dtype if is_wide_float(self.down.dtype) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where the experts compute."""
        return device_of(self.module)

    @property
    def down(self) -> Tensor:
        """The down projections: ``[E, H, D]``, or ``[E, D, H]`` if transposed."""
        return self._parameter("down_proj")

    @property
    def addresses(self) -> tuple[int, int]:
        """Where the weights are in memory."""
        return self._parameter(self.input_name).data_ptr(), self.down.data_ptr()

    @property
    def input_name(self) -> str:
        """Name of the tensor that holds gate and up, or up alone."""
        return "gate_up_proj" if self.module.has_gate else "up_proj"

    @property
    def _blocks(self) -> tuple[tuple[int, int], int]:
        """Shape of an expert's gate and up outputs, and which of its axes tells gate from up; the other is the channel."""
        blocks = 2 if self.module.has_gate else 1
        return ((blocks, self.held), 0) if self.module.is_concatenated else ((self.held, blocks), 1)

    @property
    def _transposed(self) -> bool:
        return bool(self.module.is_transposed)

    def _parameter(self, name: str) -> Tensor:
        tensor = getattr(self.module, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def why_not_plain(self) -> str | None:
        """Why the weights cannot be reordered in place, or None if they can."""
        if hasattr(self.module, "parametrizations"):
            return f"{self.name} is parametrised"
        names = (self.input_name, "down_proj")
        for name in (*names, *(f"{name}_bias" for name in names if self.module.has_bias)):
            weight = getattr(self.module, name, None)
            where = f"{name} of {self.name}"
            if type(weight) is not nn.Parameter:
                return f"{where} is a {type(weight).__name__}"
            if is_offloaded(self.module):
                return f"{where} is offloaded"
            if not is_wide_float(weight.dtype) or weight.dim() != (3 if name in names else 2):
                return f"{where} is {weight.dtype} with shape {tuple(weight.shape)}"
            if not weight.is_contiguous():
                return f"{where} is not contiguous"
            if weight.is_inference():
                return f"{where} was made in inference mode"
        if not runs_own_forward(self.module):
            return f"the forward of {self.name} is replaced"
        return None

    def why_unknown(self) -> str | None:
        """Why the experts cannot even run masked, or None: masking computes with their weights as 3-D floats."""
        for name in (self.input_name, "down_proj"):
            weight = getattr(self.module, name, None)
            if type(weight) not in (nn.Parameter, Tensor) and not is_spread(weight):
                return f"its {name} is a {type(weight).__name__}, not a 3-D tensor of floats"
            assert isinstance(weight, Tensor)
            if not is_wide_float(weight.dtype) or weight.dim() != 3:
                found = f"{weight.dtype} with shape {tuple(weight.shape)}"
                return f"its {name} is {found}, not a 3-D tensor of floats"
        return None

    # one expert -----------------------------------------------------------------------------------------------------

    def channel_tensors(self) -> list[ChannelTensor]:
        """Every tensor that holds something of each channel. The matrices of expert None are those of all, ``[E, ...]``."""
        shape, axis = self._blocks
        outputs = int(self._transposed)

        def of(tensor: Tensor, expert: int | None) -> Tensor:
            return tensor if expert is None else tensor[expert]

        def of_inputs(tensor: Tensor, expert: int | None) -> Iterator[Matrix]:
            weight = of(tensor, expert).unflatten(outputs - 2, shape)
            for block in range(shape[axis]):
                yield weight.select(outputs - 3 + axis, block), outputs

        def of_biases(tensor: Tensor, expert: int | None) -> Iterator[Matrix]:
            bias = of(tensor, expert).unflatten(-1, shape)
            for block in range(shape[axis]):
                yield bias.select(axis - 2, block).unsqueeze(-1), 0

        def of_down(tensor: Tensor, expert: int | None) -> Iterator[Matrix]:
            yield of(tensor, expert), int(not self._transposed)

        matrices = {self.input_name: of_inputs, "down_proj": of_down}
        if self.module.has_bias:
            matrices[f"{self.input_name}_bias"] = of_biases
        return [ChannelTensor(f"{self.name}.{name}", self._parameter(name), views) for name, views in matrices.items()]

    def swap(self, expert: int, first: Tensor, second: Tensor) -> None:
        """Exchange channels of one expert in place (see :func:`swap_channels`); its function stays the same."""
        held = self.channel_tensors()
        swap_channels((matrix for t in held for matrix in t.matrices(t.tensor, expert)), first, second)

    def input_views(self, expert: int, width: int) -> list[tuple[Tensor, Tensor | None]]:
        """Gate and up of an expert's first ``width`` channels, as ``[H, n]`` and a bias: views.

        Their outputs, one behind the other, are what the module's ``_apply_gate`` takes.
        """
        weight = self._parameter(self.input_name)[expert]
        weight = weight if self._transposed else weight.t()
        bias = self._parameter(f"{self.input_name}_bias")[expert] if self.module.has_bias else None
        return [(weight[:, a:b], None if bias is None else bias[a:b]) for a, b in self._spans(width)]

    def _spans(self, width: int) -> list[tuple[int, int]]:
        """Where the outputs of gate and up for the first ``width`` channels stand."""
        if not self.module.has_gate:
            return [(0, width)]
        if self.module.is_concatenated and width < self.held:
            return [(0, width), (self.held, self.held + width)]
        return [(0, 2 * width)]

    def views(self, expert: int, width: int) -> ExpertViews:
        """The weights of an expert's first ``width`` channels."""
        return ExpertViews(self.input_views(expert, width), self.down_view(expert, width))

    def down_view(self, expert: int, width: int) -> tuple[Tensor, Tensor | None]:
        """The down projection of an expert's first ``width`` channels, as ``[width, H]``, and its bias: views."""
        weight = self.down[expert]
        bias = self._parameter("down_proj_bias")[expert] if self.module.has_bias else None
        return (weight if self._transposed else weight.t())[:width], bias

    # all experts ----------------------------------------------------------------------------------------------------

    def all_views(self, width: int) -> ExpertViews:
        """The weights of every expert's first ``width`` channels: like :meth:`views`, with a leading axis ``[E, ...]``."""
        weight, down = self._parameter(self.input_name), self.down
        weight, down = (weight, down) if self._transposed else (weight.transpose(1, 2), down.transpose(1, 2))
        bias = self._parameter(f"{self.input_name}_bias") if self.module.has_bias else None
        inputs: list[View] = [
            (weight[:, :, a:b], None if bias is None else bias[:, a:b]) for a, b in self._spans(width)
        ]
        return ExpertViews(
            inputs, (down[:, :width], self._parameter("down_proj_bias") if self.module.has_bias else None)
        )

    @torch.no_grad()
    def down_column_norms(self) -> Tensor:
        """``||W_down[e, :, i]||_2``, ``[E, D]``, in float32 (float64 for float64 weights)."""
        dtype = torch.promote_types(self.float_dtype, torch.float32)
        with loaded(self.module):
            norms = [weight_norms(down, int(self._transposed), dtype) for down in local(self.down)]
        return of_chosen(self.shard, torch.stack(norms))

    @torch.no_grad()
    def input_norms(self) -> Tensor:
        """Norm of each channel's weights in gate and up together, ``[E, D]``."""
        dtype = torch.promote_types(self.float_dtype, torch.float32)
        shape, axis = self._blocks
        with loaded(self.module):
            weights = local(self._parameter(self.input_name))
            norms = torch.stack([weight_norms(weight, int(not self._transposed), dtype) for weight in weights])
        return of_chosen(self.shard, torch.linalg.vector_norm(norms.unflatten(1, shape), dim=1 + axis))


def layout_of(module: nn.Module) -> str:
    """The layout in words."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    words: Sequence[str] = [
        "3-D",
        *(["interleaved"] if module.has_gate and not module.is_concatenated else []),
        *(["transposed"] if module.is_transposed else []),
        *(["biased"] if module.has_bias else []),
        *([] if module.has_gate else ["ungated"]),
    ]
    return f"experts.{{{name}, down_proj}} ({', '.join(words)})"
