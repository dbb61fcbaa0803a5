"""Root mean square norms of decoder layers, for a few tokens and for prompts, by the compiled library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..executors.static import StaticSteps
from ..kernels import Matvec
from ..ops.layer import KINDS, norm, norm_takes
from .few import FewTokens, Forward


class Replaced(NamedTuple):
    """A norm whose forward was replaced."""

    forward: Forward
    eps: str  # the module's name for it
    kind: int  # one of pop_mm.ops.layer.KINDS


class FewTokensNorms(FewTokens):
    """Norms of a few operators each, which cost a small model more than what they compute.

    Parameters
    ----------
    is_prompt : callable
        Whether the forward of the model that runs now is a prompt's, of any number of tokens.

    Attributes
    ----------
    replaced : dict of nn.Module to Replaced
    """

    def __init__(
        self, library: Matvec, few: Callable[[], bool], static: StaticSteps, is_prompt: Callable[[], bool]
    ) -> None:
        super().__init__(library, few, static)
        self.is_prompt = is_prompt
        self.replaced: dict[nn.Module, Replaced] = {}

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        super().detach()
        self.replaced.clear()

    def forward_of(self, module: nn.Module) -> Forward | None:
        """None unless the module computes what the library does, as far as two random tokens can tell."""
        parameters: dict[str, Any] = module._parameters
        weight = parameters.get("weight")
        names = ("variance_epsilon", "eps")
        eps = next((name for name in names if isinstance(getattr(module, name, None), float)), None)
        if weight is None or weight.dim() != 1 or eps is None:
            return None
        kind = self._kind(module, weight.detach(), getattr(module, eps))
        if kind is None:
            return None
        few, is_prompt, static, own_forward = self.few, self.is_prompt, self.static, type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:  # a gated norm takes more than one argument
            weight = parameters["weight"]
            mine = not static.active and len(args) == 1 and not kwargs and (few() or is_prompt())
            if not mine or not norm_takes(args[0], weight):
                return own_forward(module, *args, **kwargs)
            return norm(args[0], weight, getattr(module, eps), kind)

        self.replaced[module] = Replaced(forward, eps, kind)
        return forward

    @torch.no_grad()
    def _kind(self, module: nn.Module, weight: Tensor, eps: float) -> int | None:
        """Which of the library's norms is nearest to the module; None if none is near."""
        x = torch.randn(2, weight.numel(), generator=torch.Generator().manual_seed(0), device="cpu")
        x[1] *= eps**0.5  # where eps matters
        x = x.to(weight.dtype)
        if not norm_takes(x, weight):
            return None
        try:
            expected = module.forward(x)
        except Exception:  # one that wants more than x is left to its own forward
            return None
        if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
            return None
        found = [norm(x, weight, eps, kind) for kind in range(len(KINDS))]
        kind = min(range(len(KINDS)), key=lambda kind: float((found[kind] - expected).abs().sum()))
        near = 4 * torch.finfo(x.dtype).eps
        return kind if torch.allclose(found[kind], expected, rtol=near, atol=near * eps) else None
