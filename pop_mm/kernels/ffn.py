"""A whole FFN for a few tokens in one call of the compiled library: gate, up, activation, the choice among candidates, down."""

from __future__ import annotations

from struct import pack

import torch
from torch import Tensor

from ..partition import Sizes
from ..weights.layout import FFN
from . import Matvec, Rows, TakesFew
from .activations import ACTIVATIONS, activation_name
from .functions import untraced


class Scratch:
    """Memory that the FFNs of a session use in turn, so that it stays in the cache, and what they measure.

    Attributes
    ----------
    address : int
        Of ``size`` bytes.
    seconds : Tensor
        ``[1]``, float64: what the choices among candidates have taken.
    """

    def __init__(self) -> None:
        self.seconds = torch.zeros(1, dtype=torch.float64, device="cpu")
        self.make_room(0)

    def make_room(self, size: int) -> None:
        """Have at least ``size`` bytes."""
        self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.address, self.size = self._memory.data_ptr(), size


class FFNStep(TakesFew):
    """An FFN on its first K channels, where R stands in front of C.

    Parameters
    ----------
    matvec : Matvec
        Of the compiled library.
    ffn : FFN
        For which :meth:`fits` holds; its weights are read where they are now.
    sizes : Sizes
    scratch : Scratch
    """

    def __init__(self, matvec: Matvec, ffn: FFN, sizes: Sizes, scratch: Scratch) -> None:
        inputs = [view for p in ffn.inputs for view in p.narrow_views(sizes.width)]
        (down, down_bias), (up, up_bias) = ffn.down.narrow_views(sizes.width)[0], inputs[-1]
        gate, gate_bias = inputs[0] if len(inputs) == 2 else (None, None)
        name = activation_name(ffn.activation)
        assert name is not None, "fits() was not asked"
        self._kept = [t for t in (gate, up, down, gate_bias, up_bias, down_bias) if t is not None]  # as the memory is
        self._ffn = pack(
            "=14q",
            *(0 if t is None else t.data_ptr() for t in (gate, up, down, gate_bias, up_bias, down_bias)),
            *(0 if t is None else t.stride(1) for t in (gate, up, down)),
            *(ffn.hidden_size, sizes.width, sizes.retained, sizes.candidates_dropped, list(ACTIVATIONS).index(name)),
        )
        self._function = matvec.ffn[up.dtype]
        self.dtype, self.columns = up.dtype, ffn.hidden_size
        self._scratch, self._clock = scratch, scratch.seconds.data_ptr()
        self._keys = _aligned(8 * sizes.candidates)  # bytes: of the choice, and of a token as floats and as it is
        self._wide = _aligned(4 * max(ffn.hidden_size, sizes.width))
        self._narrow = _aligned(2 * up.element_size() * sizes.width)

    @staticmethod
    def fits(ffn: FFN) -> bool:
        """Whether the library can compute an FFN that is ``act(gate) * up`` or ``act(up)``, then down."""
        views = [view for p in ffn.projections for view in p.narrow_views(ffn.size)]
        biases = [bias for _, bias in views if bias is not None]
        return (
            Rows.fit([weight.t() for weight, _ in views])
            and all(bias.dtype == views[0][0].dtype and bias.is_contiguous() for bias in biases)
            and activation_name(ffn.activation) is not None
        )

    @untraced
    def __call__(
        self, x: Tensor, weight: Tensor | None = None, valid: Tensor | None = None, dropped: int | None = None
    ) -> Tensor:
        """The output of the FFN, in the shape of ``x``.

        Parameters
        ----------
        x : Tensor
            ``[..., H]``, of each sequence one token.
        weight : Tensor or None
            ``[|C|]``, float32: the scorer's weight of the candidate at each place; None if there are no candidates.
        valid : Tensor or None
            ``[tokens]``, boolean: which of several have a say in the choice.
        dropped : int or None
            Address that takes the candidates that were left out, ``[1, n]``, int64.
        """
        x = x.contiguous()
        tokens = x.numel() // self.columns
        scratch, wide = self._scratch, self._keys
        narrow = wide + tokens * self._wide
        if (size := narrow + tokens * self._narrow) > scratch.size:
            scratch.make_room(size)
        valid = None if valid is None else valid.contiguous()
        out = torch.empty(x.shape, dtype=self.dtype, device="cpu")
        self._function(
            self._ffn,
            x.data_ptr(),
            tokens,
            None if weight is None else weight.data_ptr(),
            None if valid is None else valid.data_ptr(),
            scratch.address + wide,
            scratch.address + narrow,
            scratch.address,
            dropped,
            out.data_ptr(),
            self._clock,
            torch.get_num_threads(),
        )
        return out


def _aligned(size: int) -> int:
    """The bytes to set aside for ``size``: whole cache lines."""
    return -(-size // 64) * 64
