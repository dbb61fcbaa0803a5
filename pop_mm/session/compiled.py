"""Compiled decode steps: what ``generate`` runs with a static cache, where transformers compiles the model's call.

The model's hooks say which prompt a step belongs to and bring its channels to the front; none of that can be traced, so it
stays around the compiled function, which sees nothing but tensors at fixed addresses. One graph serves every prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from ..executors.narrow import NarrowExecutor
from ..tracking.phase import Phase, PhaseTracker

if TYPE_CHECKING:
    from transformers import CompileConfig


class CompiledSteps:
    """Stands for a model's ``get_compiled_call`` in a session.

    Parameters
    ----------
    model : PreTrainedModel
    tracker : PhaseTracker
    inplace : NarrowExecutor or None
        None if a step of this session cannot be traced: then it runs as it is.
    compiling : callable
        Gives a context within which code runs compiled although the session lets all else run eagerly.
    """

    def __init__(
        self,
        model: Any,
        tracker: PhaseTracker,
        inplace: NarrowExecutor | None,
        compiling: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._model = model
        self._tracker = tracker
        self._inplace = inplace
        self._compiling = compiling
        self._options: dict[str, Any] | None = None
        self._compiled: Callable[..., Any] | None = None

    def get_compiled_call(self, compile_config: CompileConfig | None = None) -> Callable[..., Any]:
        """What transformers calls instead of the model for single steps; compiled when a step first needs it."""
        from transformers import CompileConfig

        options = (compile_config or CompileConfig()).to_dict()
        if self._compiled is None or options != self._options:
            self._options, self._compiled = options, torch.compile(_own_code(self._model.forward), **options)
        return self._call

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracker.around(self._step, args, kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._tracker.current
        assert forward is not None and self._compiled is not None
        if self._inplace is not None:
            if forward.phase is Phase.DECODE and self._inplace.prepare_traced(forward):
                with self._inplace.static.step(forward), self._compiling():
                    return self._compiled(*args, **kwargs)
            self._inplace.static.flush()
        return self._model.forward(*args, **kwargs)


def _own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward as a function with a code object of its own: torch.compile counts recompilations by code object."""

    def step(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
