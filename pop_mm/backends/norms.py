"""Root mean square norms of decoder layers, for a single token, by the compiled library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .single import Forward, SingleToken


class SingleTokenNorms(SingleToken):
    """Norms of a few operators each, which cost a step of a small model more than what they compute."""

    def forward_of(self, module: nn.Module) -> Forward | None:
        """None unless the module computes what the library does, as far as two random tokens can tell."""
        weight = module._parameters.get("weight")
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if "RMSNorm" not in type(module).__name__ or weight is None or not isinstance(eps, float):
            return None
        from_zero = self._weight_counts_from_zero(module, weight.detach(), eps)
        if from_zero is None:
            return None
        parameters: dict[str, Any] = module._parameters
        single, static, norm = self.single, self.static, self.library.norm
        own_forward = type(module).forward

        def forward(hidden_states: Tensor) -> Tensor:  # transformers' name for it
            weight = parameters["weight"]
            if static.active or not single() or not norm.takes(hidden_states, weight):
                found: Tensor = own_forward(module, hidden_states)
                return found
            return norm(hidden_states, weight, eps, from_zero)

        return forward

    @torch.no_grad()
    def _weight_counts_from_zero(self, module: nn.Module, weight: Tensor, eps: float) -> bool | None:
        """Which of the library's two norms the module is; None if neither."""
        x = torch.randn(2, weight.numel(), generator=torch.Generator().manual_seed(0))
        x[1] *= eps**0.5  # where eps matters
        x = x.to(weight.dtype)
        if not self.library.norm.takes(x, weight):
            return None
        try:
            expected = module.forward(x)
        except Exception:  # one that wants more than x is left to its own forward
            return None
        if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
            return None
        near = 4 * torch.finfo(x.dtype).eps
        for from_zero in False, True:
            if torch.allclose(self.library.norm(x, weight, eps, from_zero), expected, rtol=near, atol=near * eps):
                return from_zero
        return None
