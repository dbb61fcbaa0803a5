"""What a decode step reads besides the FFNs: the plain linear modules of attention and the lm_head, by the compiled kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..classes import has_own_forward
from ..formats import stored, tensors_behind
from ..kernels import Rows, traced
from ..ops.dot import Dot
from .few import FewTokens, Forward


class FewTokensLinears(FewTokens):
    """Modules that are nothing but ``x @ W.T + b``."""

    def forward_of(self, module: nn.Module) -> Forward | None:
        """None for anything else, and for weights that the kernel cannot read."""
        if type(module) is not nn.Linear or not has_own_forward(nn.Linear):
            return None
        if (found := stored(module.weight)) is not None and found.scale is not None:
            return self._scaled(module)
        if not Rows.fit([module.weight]):
            return None
        parameters: dict[str, Any] = module._parameters
        few, matvec, static = self.few, self.library, self.static
        own_forward = type(module).forward
        rows: Rows | None = None
        address = 0

        def forward(input: Tensor) -> Tensor:  # nn.Linear's name for it, which a caller may use
            nonlocal rows, address
            if static.active and traced.fits(input, module.weight):
                return traced.matvec(input.reshape(1, -1), module.weight, module.bias).view(*input.shape[:-1], -1)
            if static.active or not few():
                return own_forward(module, input)
            weight, bias = parameters["weight"], parameters["bias"]
            if weight.data_ptr() != address:
                rows, address = rows_of_linear(weight, bias), weight.data_ptr()
            if rows is None or not rows.takes(input):
                return own_forward(module, input)
            return matvec((rows,), input.reshape(-1, input.shape[-1])).view(*input.shape[:-1], -1)

        return forward

    def _scaled(self, module: nn.Module) -> Forward | None:
        """Of int8 weights, for one token."""
        parameters: dict[str, Any] = module._parameters
        few, static, own_forward = self.few, self.static, type(module).forward
        kernel: Dot | None = None
        address: tuple[int, ...] = ()

        def forward(input: Tensor) -> Tensor:
            nonlocal kernel, address
            if static.active or not few() or input.numel() != input.shape[-1]:
                return own_forward(module, input)
            weight, bias = parameters["weight"], parameters["bias"]
            behind = (*tensors_behind(weight), *(() if bias is None else (bias,)))
            now = tuple(tensor.data_ptr() for tensor in behind)
            if now != address:
                found, address = stored(weight), now
                fits = found is not None and Dot.fits(found, bias)
                kernel = None
                if fits and found is not None and found.scale is not None:
                    kernel = Dot(found.matrix, found.scale, bias, found.dtype)
            if kernel is None or not kernel.takes(input):
                return own_forward(module, input)
            return kernel(input)

        return forward


def rows_of_linear(weight: Tensor, bias: Tensor | None) -> Rows | None:
    """A linear module's weight and bias for the kernel; None if it cannot read the weight."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return Rows([weight], [bias]) if Rows.fit([weight]) else None
