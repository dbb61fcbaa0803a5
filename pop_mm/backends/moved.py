"""The tensors in which channels stand elsewhere, from the first move until all are back.

What is exchanged are the tensors that were the weights when the first channel moved, and their gradients. A weight that
somebody puts in their place is in the original order and is left alone; the one that it replaced is put back all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SessionError
from ..experts import Experts
from ..layout import FFN, Matrix, swap_channels
from ..phase import set_instance_attribute


class Versions:
    """The version counters of a session's weights as the session left them; any other value is somebody else's writing.

    Attributes
    ----------
    of : dict of int to int
        ``id(tensor)`` -> its version.
    written : str or None
        The first weight that somebody wrote to while its channels were moved.
    """

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.written: str | None = None


class _Held(NamedTuple):
    name: str
    parameter: Tensor
    stored: Tensor  # shares its memory and its version counter, and stays what it is if ``parameter.data`` is replaced
    matrices: Callable[[Tensor, int | None], Iterable[Matrix]]


class MovedWeights:
    """The weights of one FFN, or of a layer's experts, while channels of theirs are not in their own places.

    Parameters
    ----------
    record : FFN or Experts
    versions : Versions
        Of the session.

    Attributes
    ----------
    moves : int
        How often channels were exchanged.
    """

    def __init__(self, record: FFN | Experts, versions: Versions) -> None:
        self._record = record
        self._versions = versions
        self._held: list[_Held] = []
        self.moves = 0

    def exchange(self, first: Tensor, second: Tensor, expert: int | None = None) -> None:
        """Exchange channels in the weights and their gradients (see :func:`pop_mm.layout.swap_channels`)."""
        with self.rearranging():
            self.moves += 1
            swap_channels(self._matrices(expert), first, second)

    def _matrices(self, expert: int | None) -> Iterator[Matrix]:
        for held in self._held:
            yield from held.matrices(held.stored, expert)
            grad = held.parameter.grad
            if grad is not None and grad.layout is torch.strided and grad.shape == held.stored.shape:
                yield from held.matrices(grad, expert)

    @contextmanager
    def rearranging(self) -> Iterator[None]:
        """Around whatever the session itself does to the weights."""
        if not self._held:
            self._hold()
        self.look()
        try:
            yield
        finally:
            of = self._versions.of
            for held in self._held:
                if id(held.parameter) in of:
                    of[id(held.parameter)] = held.parameter._version

    @torch.inference_mode(False)
    def _hold(self) -> None:
        self._held = [_Held(t.name, t.tensor, t.tensor.detach(), t.matrices) for t in self._record.channel_tensors()]

    def look(self) -> None:
        """Note if somebody has written to a weight since: whether in the original order, nobody can tell."""
        of = self._versions.of
        for held in self._held:
            version = held.parameter._version
            replaced = held.parameter.data_ptr() != held.stored.data_ptr()
            if of.get(id(held.parameter), version) != version and not replaced and self._versions.written is None:
                self._versions.written = held.name

    @property
    def holds(self) -> bool:
        """Whether some channels stand elsewhere, or did until a moment ago."""
        return bool(self._held)

    def release(self) -> None:
        """All channels are back."""
        self._held = []

    def guarded(self, out: Tensor) -> Tensor:
        """The FFN's output, whose gradients may go to the weights only while the channels stand as they do now."""
        if out.requires_grad:
            now = self.moves
            out.register_hook(lambda _: self._require(now))
        return out

    def _require(self, moves: int) -> None:
        if moves != self.moves:
            raise SessionError(
                f"Channels of {self._record.name} have moved since the forward that is differentiated, so its gradients would "
                "go to other channels. Call backward() before another prompt decodes, before the weights are saved and before "
                "the session ends; or use backend='masked', which moves none."
            )


def before_moves(module: nn.Module, canonical: Callable[..., None]) -> Iterator[Callable[[], object]]:
    """Call something before anybody takes a module's weights, loads others, or moves them; yields what undoes that."""
    yield module.register_state_dict_pre_hook(canonical).remove
    yield module.register_load_state_dict_pre_hook(canonical).remove
    yield set_instance_attribute(module, "_apply", _after(canonical, module._apply))


def _after(first: Callable[[], None], own: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return own(*args, **kwargs)

    return call
