"""Decode steps of an FFN in Triton kernels, for 1 to 8 sequences: all with one partition, or each with its own.

Everything that a step writes but its result lies in buffers that are made once, so that a CUDA graph finds them where they
were. Nothing here needs a GPU or Triton before a step is made; with TRITON_INTERPRET=1 in the environment the kernels run on
the CPU, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import ConfigError
from ..partition import Sizes
from ..weights.layout import FFN, linear
from .activations import activation_name

MAX_ROWS = 8
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Blocks: chosen by counting registers and programs, not measured.
_VECTOR = {"ROWS": 1, "BLOCK_CHANNELS": 8, "BLOCK_HIDDEN": 512}
_MATRIX = {"ROWS": 16, "BLOCK_CHANNELS": 16, "BLOCK_HIDDEN": 128}  # 16 is the least that tl.dot takes
_SELECT = {"BLOCK": 16, "CHUNK": 256}
_DOWN = {"BLOCK_CHANNELS": 16, "BLOCK_HIDDEN": 256}
_PROGRAMS = 1024  # of the gathered down projection: several for each multiprocessor


def require(devices: Iterable[torch.device]) -> None:
    """Raise :class:`ConfigError` if the kernels cannot run on one of these devices."""
    other = sorted({device.type for device in devices} - {"cuda", "meta"})
    if other and not _interpreted():
        raise ConfigError(
            f"kernels='triton' runs on CUDA devices, but FFNs to prune are on {', '.join(other)}. Move the model with "
            "model.to('cuda'), or use kernels='auto'."
        )
    if find_spec("triton") is None:
        raise ConfigError(
            "kernels='triton' needs the package triton, which is not installed. CUDA builds of torch for Linux bring it; "
            "otherwise: pip install triton. Or use kernels='auto'."
        )


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits(ffn: FFN) -> bool:
    """Whether the kernels can compute an FFN that is ``act(gate) * up`` or ``act(up)``, then down."""
    tensors = [t for p in ffn.projections for t in (p.weight, p.bias) if t is not None]
    inputs = [weight for p in ffn.inputs for weight, _ in p.narrow_views(ffn.size)]
    return (
        ffn.float_dtype in _DTYPES
        and len({(t.dtype, t.device) for t in tensors}) == 1
        and len({weight.stride() for weight in inputs}) == 1
        and activation_name(ffn.activation) is not None
    )


class _Step:
    """What both kinds of steps need; ``groups`` is how many partitions there can be."""

    def __init__(self, ffn: FFN, sizes: Sizes, width: int, groups: int) -> None:
        from . import triton_ffn

        self._kernels = triton_ffn
        self._sizes = sizes
        views = [view for p in ffn.inputs for view in p.narrow_views(width)]
        self._up, self._up_bias = views[-1]
        self._gate: Tensor | None
        self._gate_bias: Tensor | None
        self._gate, self._gate_bias = views[0] if len(views) == 2 else (None, None)
        self._down, self._down_bias = ffn.down.narrow_views(width)[0]
        name = activation_name(ffn.activation)
        assert name is not None, "fits() was not asked"
        wide = torch.promote_types(self._up.dtype, torch.float32)
        self._accumulate = triton_ffn.dtype_of(wide)
        narrow = torch.float32 if _interpreted() and self._up.dtype is torch.bfloat16 else self._up.dtype
        self._operands = triton_ffn.dtype_of(narrow)
        self._activation = name
        self._hidden = self._up.shape[0]
        with torch.inference_mode(False):  # buffers that may be written in and out of inference mode
            self._h = self._up.new_empty(MAX_ROWS, sizes.width)
            self._weight = self._up.new_empty(groups, sizes.candidates, dtype=wide)
            self._scores = torch.empty_like(self._weight)
            self._dropped = self._up.new_empty(groups, sizes.candidates_dropped, dtype=torch.int64)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels can compute these tokens, ``[B, H]``: they know neither autograd nor autocast."""
        return (
            x.dtype is self._up.dtype
            and x.device == self._up.device
            and 1 <= len(x) <= MAX_ROWS
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
        )

    def _compute_h(self, x: Tensor, channels: Tensor | None, valid: Tensor | None) -> Tensor:
        """``[B, K]``: the input of the down projection, with zeros on the candidates that the step leaves out."""
        rows, sizes = len(x), self._sizes
        alone = channels is not None or rows == 1  # a program has one row
        blocks = _VECTOR if alone else _MATRIX
        x = x if x.stride(1) == 1 else x.contiguous()
        self._kernels.hidden_kernel[rows if alone else 1, -(-sizes.width // blocks["BLOCK_CHANNELS"])](
            x,
            self._gate,
            self._up,
            self._gate_bias,
            self._up_bias,
            channels,
            self._weight if sizes.candidates else None,
            None if valid is None else valid.contiguous().view(torch.uint8),
            self._h,
            self._scores,
            1 if alone else rows,
            self._hidden,
            sizes.width,
            sizes.retained,
            x.stride(0),
            self._up.stride(1),
            self._up.stride(0),
            ACCUMULATE=self._accumulate,
            OPERANDS=self._operands,
            ACTIVATION=self._activation,
            **blocks,
        )
        if sizes.candidates_dropped:
            groups = 1 if channels is None else rows
            self._kernels.select_kernel[groups, -(-sizes.candidates // _SELECT["BLOCK"])](
                self._h,
                self._scores,
                self._dropped,
                sizes.width,
                sizes.retained,
                sizes.candidates_dropped,
                ROWS=rows // groups,
                **_SELECT,
            )
        return self._h[:rows]


class FusedStep(_Step):
    """A decode step on the first K channels of the weights, R first, then C: one partition for all rows.

    Two kernels (gate, up, activation and scores; the choice) and a product of torch's on the narrow view of down.

    Parameters
    ----------
    ffn : FFN
        One that :func:`fits`. Its weights are read where they are now.
    sizes : Sizes
    """

    def __init__(self, ffn: FFN, sizes: Sizes) -> None:
        super().__init__(ffn, sizes, sizes.width, 1)

    @property
    def dropped(self) -> Tensor:
        """``[1, n]``: which candidates the latest step left out, as places behind R."""
        return self._dropped

    def load(self, weight: Tensor) -> None:
        """Take over the scorer's weight of each candidate, ``[|C|]``, in the order in which they stand in the weights."""
        self._weight.copy_(weight)

    def __call__(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """The FFN of one token a row.

        Parameters
        ----------
        x : Tensor
            ``[B, H]``, that :meth:`takes`.
        valid : Tensor or None
            ``[B]`` boolean: the rows that count in the choice.

        Returns
        -------
        Tensor
            ``[B, H]``.
        """
        with torch.cuda.device_of(x):
            return linear(self._compute_h(x, None, valid), self._down, self._down_bias)


class GatheredStep(_Step):
    """A decode step in which each row has its own channels, wherever in the weights they are: nothing is reordered.

    Four kernels: gate, up, activation and scores; the choice; down in parts; their sum. Each reads whole rows of gate and up,
    and of down whole columns, which is fast where those are contiguous: for a weight stored ``[D, H]``.

    Parameters
    ----------
    ffn : FFN
        One that :func:`fits`. Its weights are read where they are now.
    sizes : Sizes
    """

    def __init__(self, ffn: FFN, sizes: Sizes) -> None:
        super().__init__(ffn, sizes, ffn.size, MAX_ROWS)
        with torch.inference_mode(False):
            self._channels = self._up.new_empty(MAX_ROWS, sizes.width, dtype=torch.int64)
            parts = max(rows * self._splits(rows)[0] for rows in range(1, MAX_ROWS + 1))
            self._partial = self._up.new_empty(parts * self._hidden, dtype=self._scores.dtype)

    def dropped(self, rows: int) -> Tensor:
        """``[B, n]``: which candidates the latest step left out, as indices into each row's own."""
        return self._dropped[:rows]

    def load(self, channels: Tensor, weight: Tensor) -> None:
        """Take over each row's channels.

        Parameters
        ----------
        channels : Tensor
            ``[B, K]``, int64: R, then C.
        weight : Tensor
            ``[B, |C|]``: the scorer's weight of each candidate.
        """
        self._channels[: len(channels)] = channels
        self._weight[: len(weight)] = weight

    def __call__(self, x: Tensor) -> Tensor:
        """The FFN of one token a row, ``[B, H]``, that :meth:`takes`; for the rows of :meth:`load`."""
        with torch.cuda.device_of(x):
            h = self._compute_h(x, self._channels, None)
            rows, hidden = len(x), self._hidden
            splits, split_width = self._splits(rows)
            blocks = -(-hidden // _DOWN["BLOCK_HIDDEN"])
            self._kernels.down_kernel[rows, blocks, splits](
                h,
                self._channels,
                self._down,
                self._partial,
                self._sizes.width,
                hidden,
                self._down.stride(0),
                self._down.stride(1),
                split_width,
                ACCUMULATE=self._accumulate,
                **_DOWN,
            )
            out = x.new_empty(rows, hidden)
            self._kernels.sum_kernel[rows, blocks](
                self._partial, self._down_bias, out, splits, hidden, BLOCK=_DOWN["BLOCK_HIDDEN"]
            )
            return out

    def _splits(self, rows: int) -> tuple[int, int]:
        """Into how many parts the channels are split, and how many channels a part has."""
        blocks = -(-self._sizes.width // _DOWN["BLOCK_CHANNELS"])
        wanted = max(1, _PROGRAMS // (rows * -(-self._hidden // _DOWN["BLOCK_HIDDEN"])))
        a_part = -(-blocks // min(blocks, wanted))
        return -(-blocks // a_part), a_part * _DOWN["BLOCK_CHANNELS"]
