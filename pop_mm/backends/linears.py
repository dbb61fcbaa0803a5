"""What a decode step reads besides the FFNs: the plain linear modules of attention and the lm_head, by the compiled kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..kernels import Matvec, Rows, traced
from ..phase import set_instance_attribute
from .static import StaticSteps


class SingleTokenLinears:
    """Linear modules whose forward takes the compiled kernel for one token, and their own forward for all else.

    Parameters
    ----------
    matvec : Matvec
    single : callable
        Whether the forward of the model that runs now is such a step.
    static : StaticSteps
    """

    def __init__(self, matvec: Matvec, single: Callable[[], bool], static: StaticSteps) -> None:
        self._matvec = matvec
        self._single = single
        self._static = static
        self._undo: list[Callable[[], object]] = []

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Replace the forwards, on the instance, of those modules that are nothing but ``x @ W.T + b``."""
        for module in modules:
            if type(module) is nn.Linear and "forward" not in module.__dict__ and Rows.fit([module.weight]):
                self._undo.append(set_instance_attribute(module, "forward", self._forward(module)))

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        while self._undo:
            self._undo.pop()()

    def _forward(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        parameters: dict[str, Any] = module._parameters
        single, matvec, static = self._single, self._matvec, self._static
        own_forward = type(module).forward
        rows: tuple[Rows, ...] = ()
        address = 0

        def forward(input: Tensor) -> Tensor:  # nn.Linear's name for it, which a caller may use
            nonlocal rows, address
            if static.active and traced.fits(input, module.weight):
                return traced.matvec(input.reshape(1, -1), module.weight, module.bias).view(*input.shape[:-1], -1)
            if static.active or not single():
                return own_forward(module, input)
            weight, bias = parameters["weight"], parameters["bias"]
            if weight.data_ptr() != address:
                rows, address = rows_of_linear(weight, bias), weight.data_ptr()
            if not rows or not rows[0].takes(input):
                return own_forward(module, input)
            return matvec(rows, input.reshape(1, -1)).view(*input.shape[:-1], -1)

        return forward


def rows_of_linear(weight: Tensor, bias: Tensor | None) -> tuple[Rows, ...]:
    """A linear module's weight and bias for the kernel; empty if it cannot read the weight."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return (Rows([weight], [bias]),) if Rows.fit([weight]) else ()
