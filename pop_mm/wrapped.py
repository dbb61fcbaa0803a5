"""A session whose caller goes on using what is around the model: ``peft_model.generate``, ``compiled(ids)``."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .adapters import Adapter
from .adapters.checking import probe_foreign
from .config import PopConfig
from .session import Session
from .unwrap import unwrap


class WrappedSession(Session):
    """A session that also routes plain forwards of wrappers to the model, while it is attached.

    It probes an adapter that had no weights to be probed on when the session was made.
    """

    def __init__(self, model: nn.Module, config: PopConfig, adapter: Adapter | None = None) -> None:
        self._unwrapped = unwrap(model)
        self._restore: Callable[[], None] | None = None
        super().__init__(self._unwrapped.model, config, adapter)

    def attach(self) -> Session:
        """As :meth:`Session.attach`; AdapterError if the adapter turns out to break its contract."""
        if not self.attached and not self._probed:
            self._probed = probe_foreign(self.model, self._adapter, [plan.ffn for plan in self.plans])
        super().attach()
        self._restore = self._unwrapped.install()
        return self

    def detach(self) -> None:
        """As :meth:`Session.detach`."""
        restore, self._restore = self._restore, None
        try:
            super().detach()
        finally:
            if restore is not None:
                restore()
