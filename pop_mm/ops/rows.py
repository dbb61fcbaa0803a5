"""Decode steps of one token that read chosen rows of input-major matrices, on a CPU by C compiled for its dtype.

What they compute is said by :mod:`.reference`: which entries count, and what is rounded where. Thresholds are read from memory at
each call, and counts are added to memory, so nothing passes through Python. Sums do not depend on chance: they are the same for
the same number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import calcsize, pack

import torch
from torch import Tensor

from ..kernels import View
from ..kernels.activations import ACTIVATIONS
from ..kernels.functions import untraced
from .library import Library, library
from .reference import FFNWeights

_FFN = "=23q"  # as the C functions take it
NO_FFN = bytes(calcsize(_FFN))


def why_not(weights: Sequence[View], dtype: torch.dtype | None = None) -> str | None:
    """Why the compiled functions cannot read these, ``[..., in, out]`` each, or None if they can.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Of inputs, biases and outputs; by default that of the weights.
    """
    from .library import why_not_dtypes

    stored, biases = weights[0][0].dtype, [bias for _, bias in weights if bias is not None]
    dtype = stored if dtype is None else dtype
    if any(not t.is_cpu for t in (*(weight for weight, _ in weights), *biases)):
        return "the weights are not on the CPU"
    if len(found := {weight.dtype for weight, _ in weights}) > 1 or any(bias.dtype is not dtype for bias in biases):
        dtypes = found | {bias.dtype for bias in biases}
        return f"the weights have several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    for weight, bias in weights:
        rows, columns = weight.shape[-2:]
        if not weight.numel():
            return f"a weight is empty: {tuple(weight.shape)}"
        if (columns > 1 and weight.stride(-1) != 1) or (rows > 1 and weight.stride(-2) < columns):
            return f"a weight is not stored input-major: {tuple(weight.shape)} with strides {weight.stride()}"
        if bias is not None and columns > 1 and bias.stride(-1) != 1:
            return f"a bias is not contiguous: {tuple(bias.shape)} with strides {bias.stride()}"
    return why_not_dtypes(dtype, stored)


class Room:
    """Memory that calls use in turn, so that it stays in the cache; never two at once."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.size = 0

    def address(self, size: int) -> int:
        """Of at least ``size`` bytes, at the beginning of a cache line."""
        if size > self.size:
            self._memory = torch.empty(size + 63, dtype=torch.uint8, device="cpu")
            self.size = size
        return -(-self._memory.data_ptr() // 64) * 64


class TakesOne:
    """What computes one token of one dtype and size.

    Attributes
    ----------
    dtype : torch.dtype
        Of inputs and outputs.
    columns : int
        Inputs.
    """

    dtype: torch.dtype
    columns: int

    def takes(self, x: Tensor) -> bool:
        """Whether it can compute this: one token on the CPU, of its dtype, that no gradient is wanted of."""
        return (
            x.dtype is self.dtype
            and x.is_cpu
            and x.shape[-1] == self.columns == x.numel()
            and not (x.requires_grad and torch.is_grad_enabled())
        )


class _Step(TakesOne):
    """What the functions have in common.

    Attributes
    ----------
    library : Library
    room : Room
    """

    def __init__(self, views: Sequence[View], room: Room | None, dtype: torch.dtype | None, scales: object) -> None:
        stored = views[0][0].dtype
        self.dtype = stored if dtype is None else dtype
        found = library(self.dtype, stored)
        if found is None:
            raise RuntimeError(f"there are no compiled rows: {why_not(views, dtype)}")
        if (stored is torch.int8) != (scales is not None):
            raise RuntimeError(f"weights of {stored} are given with{'out' if scales is None else ''} scales")
        self.library: Library = found
        self._views = views  # kept, as the memory is
        self.room = room or Room()
        self._sizes: dict[tuple[int, ...], int] = {}
        self.columns = views[0][0].shape[-2]


class RowsLinear(_Step):
    """Linear modules of one input, or several with one input each, by chosen rows.

    Parameters
    ----------
    matrices : sequence of tuple of Tensor and Tensor or None
        For which :func:`why_not` finds no reason: ``[in, out_i]`` and a bias ``[out_i]``.
    room : Room, optional
        To be shared with others.
    dtype : torch.dtype, optional
        Of inputs, biases and outputs; by default that of the weights.
    scales : sequence of Tensor, optional
        ``[out_i]`` each, float32 and contiguous: of weights that are int8, the factor of each output.

    Attributes
    ----------
    described : bytes
        The matrices, as the C functions take them.
    outputs : list of int
        Of each matrix.
    """

    def __init__(
        self,
        matrices: Sequence[View],
        room: Room | None = None,
        dtype: torch.dtype | None = None,
        scales: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(matrices, room, dtype, scales)
        self._scales = scales  # kept, as the memory is
        factors = [0] * len(matrices) if scales is None else [scale.data_ptr() for scale in scales]
        self._blocks = [
            pack("=5q", w.data_ptr(), 0 if b is None else b.data_ptr(), factor, w.stride(0), w.shape[1])
            for (w, b), factor in zip(matrices, factors, strict=True)
        ]
        self.described = b"".join(self._blocks)
        self.outputs = [weight.shape[1] for weight, _ in matrices]

    @untraced
    def __call__(
        self,
        x: Tensor,
        threshold: Tensor,
        norms: Tensor | None = None,
        kept: Tensor | None = None,
        only: Sequence[int] | None = None,
    ) -> tuple[Tensor, ...]:
        """As :func:`.reference.rows`.

        Parameters
        ----------
        x : Tensor
            ``[..., in]`` of one token for all matrices, that :meth:`takes`; or ``[matrices, in]``.
        threshold : Tensor
            ``[1]``, or with several vectors ``[matrices]``: float32 on the CPU, contiguous.
        norms : Tensor, optional
            ``[in]`` or ``[matrices, in]``, float32 on the CPU, contiguous: factors of the magnitudes.
        kept : Tensor, optional
            ``[1]``, int64 on the CPU: the number of entries kept is added to it.
        only : sequence of int, optional
            Numbers of the matrices that take part, in this order: of a token's experts, where something of torch's stands
            between their gates and their down projections. All other parameters are of these.

        Returns
        -------
        tuple of Tensor
            ``[out_i]`` each: views of one tensor.
        """
        x = x.contiguous()
        columns, threads = self.columns, torch.get_num_threads()
        outputs = self.outputs if only is None else [self.outputs[number] for number in only]
        total, lists = sum(outputs), 1 if x.numel() == columns else len(outputs)
        if (size := self._sizes.get((lists, total, threads))) is None:
            size = self._sizes[lists, total, threads] = self.library.rows_room(lists, columns, total, threads)
        out = torch.empty(total, dtype=self.dtype, device="cpu")
        self.library.rows(
            self.described if only is None else b"".join([self._blocks[number] for number in only]),
            len(outputs),
            lists,
            x.data_ptr(),
            columns,
            None if norms is None else norms.data_ptr(),
            threshold.data_ptr(),
            out.data_ptr(),
            None if kept is None else kept.data_ptr(),
            self.room.address(size),
            threads,
        )
        return (out,) if len(outputs) == 1 else out.split_with_sizes(outputs)


class RowsFFN(_Step):
    """FFNs of one shape by chosen rows: one FFN, or the experts of a layer.

    Parameters
    ----------
    weights : FFNWeights
        For whose views :func:`why_not` finds no reason. Norms and scales: float32 on the CPU, contiguous.
    room : Room, optional
        To be shared with others.
    dtype : torch.dtype, optional
        Of inputs, biases and outputs; by default that of the weights.

    Attributes
    ----------
    described : bytes
        The FFNs, as the C functions take them.
    """

    def __init__(self, weights: FFNWeights, room: Room | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(weights.views, room, dtype, weights.scales)
        views = (weights.gate or (None, None), weights.up, weights.down)
        matrices, biases = [weight for weight, _ in views], [bias for _, bias in views]
        experts, self._hidden, self._size = weights.up[0].shape
        self._kept = weights.norms, weights.scales  # as the memory is
        scales = [None] * (3 - len(weights.scales or ())) + list(weights.scales or ())
        self.described = pack(
            _FFN,
            *(0 if t is None else t.data_ptr() for t in (*matrices, *biases, *scales, weights.norms)),
            *(0 if t is None else t.stride(1) for t in matrices),
            *(0 if t is None else t.stride(0) for t in (*matrices, *biases)),
            *(self._hidden, self._size, experts, list(ACTIVATIONS).index(weights.activation)),
        )
        self._wide = torch.promote_types(self.dtype, torch.float32)

    @untraced
    def __call__(self, x: Tensor, threshold_x: Tensor, threshold_h: Tensor, kept: Tensor | None = None) -> Tensor:
        """The first FFN, as :func:`.reference.ffn`.

        Parameters
        ----------
        x : Tensor
            ``[..., H]`` of one token, that :meth:`takes`.
        threshold_x, threshold_h : Tensor
            ``[1]``, ``[E]``: float32 on the CPU, contiguous.
        kept : Tensor, optional
            ``[2]``, int64 on the CPU, contiguous: the numbers of entries kept are added to it, of x and of h.

        Returns
        -------
        Tensor
            In the shape of ``x``.
        """
        return self._run(x, 1, None, None, False, threshold_x, threshold_h, kept)

    @untraced
    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        router: Tensor,
        threshold_x: Tensor,
        threshold_h: Tensor,
        kept: Tensor | None = None,
    ) -> Tensor:
        """The experts of one token, as :func:`.reference.experts`; the other parameters as in :meth:`__call__`.

        Parameters
        ----------
        ids : Tensor
            ``[k]``, int64 on the CPU.
        router : Tensor
            ``[k]``, of the weights' dtype or of that of their sums.
        """
        ids, router = ids.contiguous(), router.detach()
        narrow = router.dtype is self.dtype
        router = (router if narrow else router.to(self._wide)).contiguous()
        return self._run(x, len(ids), ids, router, not narrow, threshold_x, threshold_h, kept)

    def _run(
        self,
        x: Tensor,
        count: int,
        ids: Tensor | None,
        router: Tensor | None,
        wide: bool,
        threshold_x: Tensor,
        threshold_h: Tensor,
        kept: Tensor | None,
    ) -> Tensor:
        x, threads = x.contiguous(), torch.get_num_threads()
        if (size := self._sizes.get((count, threads))) is None:
            size = self.library.ffn_room(self._hidden, self._size, count, threads)
            self._sizes[count, threads] = size
        out = torch.empty(x.shape, dtype=self.dtype, device="cpu")
        self.library.ffn(
            self.described,
            count,
            None if ids is None else ids.data_ptr(),
            None if router is None else router.data_ptr(),
            wide,
            x.data_ptr(),
            threshold_x.data_ptr(),
            threshold_h.data_ptr(),
            out.data_ptr(),
            None if kept is None else kept.data_ptr(),
            self.room.address(size),
            threads,
        )
        return out
