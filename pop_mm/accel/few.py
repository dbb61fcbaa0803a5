"""What a decode step of a few tokens runs besides the FFNs, by the compiled library: linear modules, attention, norms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..executors.static import StaticSteps
from ..kernels import Matvec
from ..patching import Patches

Forward = Callable[..., Any]


class FewTokens(ABC):
    """Modules whose forward takes the compiled library for one token of each of a few sequences, their own for all else.

    Parameters
    ----------
    library : Matvec
    few : callable
        Whether the forward of the model that runs now is such a step.
    static : StaticSteps
    """

    def __init__(self, library: Matvec, few: Callable[[], bool], static: StaticSteps) -> None:
        self.library = library
        self.few = few
        self.static = static
        self._patches = Patches()

    @abstractmethod
    def forward_of(self, module: nn.Module) -> Forward | None:
        """What to put in the place of a module's forward; None to leave it."""

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Replace the forwards, on the instance, of those modules that nobody else has replaced."""
        for module in modules:
            if "forward" not in module.__dict__ and (forward := self.forward_of(module)) is not None:
                self._patches.forward(module, forward)

    def detach(self) -> None:
        """Give the modules their own forwards back."""
        self._patches.undo()
