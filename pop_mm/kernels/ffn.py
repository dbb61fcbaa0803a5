"""A whole FFN for a few tokens in one call of the compiled library: gate, up, activation, the choice among candidates, down."""

from __future__ import annotations

from struct import pack

import torch
from torch import Tensor

from ..layout import FFN
from ..partition import Sizes
from . import MOST_TOKENS, Matvec, Rows
from .activations import ACTIVATIONS, activation_name
from .functions import untraced


class FFNStep:
    """An FFN on its first K channels, where R stands in front of C.

    Parameters
    ----------
    matvec : Matvec
        Of the compiled library.
    ffn : FFN
        For which :meth:`fits` holds; its weights are read where they are now.
    sizes : Sizes
    seconds : Tensor
        ``[1]``, float64: to which each call adds the seconds that the choice among candidates took.
    """

    def __init__(self, matvec: Matvec, ffn: FFN, sizes: Sizes, seconds: Tensor) -> None:
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
        self._dtype, self._hidden = up.dtype, ffn.hidden_size
        self._sizes = sizes
        self._make_room(1)
        self._seconds, self._clock = seconds, seconds.data_ptr()

    @torch.inference_mode(False)
    def _make_room(self, tokens: int) -> None:
        columns = max(self._hidden, self._sizes.width)
        wide = torch.empty(tokens * columns, dtype=torch.float32, device="cpu")
        narrow = torch.empty(tokens * 2 * self._sizes.width, dtype=self._dtype, device="cpu")
        keys = torch.empty(self._sizes.candidates, dtype=torch.int64, device="cpu")
        self._tokens, self._scratch = tokens, (wide, narrow, keys)
        self._addresses = [t.data_ptr() for t in self._scratch]

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

    def takes(self, x: Tensor) -> bool:
        """Whether it can compute these: a few tokens, on the CPU and of the weights' dtype."""
        few = 0 < x.numel() <= MOST_TOKENS * self._hidden
        return x.dtype is self._dtype and x.is_cpu and x.shape[-1] == self._hidden and few

    @untraced
    def __call__(
        self, x: Tensor, weight: Tensor | None = None, valid: Tensor | None = None, dropped: Tensor | None = None
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
        dropped : Tensor or None
            Takes the candidates that were left out, ``[1, n]``, int64.
        """
        x = x.contiguous()
        tokens = x.numel() // self._hidden
        if tokens > self._tokens:
            self._make_room(tokens)
        valid = None if valid is None else valid.contiguous()
        out = torch.empty(x.shape, dtype=self._dtype, device="cpu")
        self._function(
            self._ffn,
            x.data_ptr(),
            tokens,
            None if weight is None else weight.data_ptr(),
            None if valid is None else valid.data_ptr(),
            *self._addresses,
            None if dropped is None else dropped.data_ptr(),
            out.data_ptr(),
            self._clock,
            torch.get_num_threads(),
        )
        return out
