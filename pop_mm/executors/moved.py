"""The tensors in which channels stand elsewhere, from the first move until all are back.

What is exchanged are the tensors that were the weights when the first channel moved, and their gradients. A weight that
somebody puts in their place is in the original order and is left alone, unless it was made from what stood there (see
:meth:`MovedWeights.adopt`); the one that it replaced is put back all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import SessionError
from ..formats import tensors_behind
from ..patching import Patches
from ..weights.exchange import Matrix, as_integers, swap_channels
from ..weights.experts import Experts
from ..weights.layout import FFN
from .likeness import origin


class Versions:
    """The version counters of a session's weights as the session left them; any other value is somebody else's writing.

    Attributes
    ----------
    of : dict of int to int
        ``id(tensor)`` -> its version.
    written : str or None
        The first weight that somebody wrote to while its channels were moved.
    packed : str or None
        The first weight that somebody made something else of (packed, parametrised, pruned, another Parameter) while its
        channels were moved.
    """

    def __init__(self) -> None:
        self.of: dict[int, int] = {}
        self.written: str | None = None
        self.packed: str | None = None


class _Held(NamedTuple):
    name: str
    parameter: Tensor
    stored: Tensor  # shares its memory and its version counter, and stays what it is if ``parameter.data`` is replaced
    matrices: Callable[[Tensor, int | None], Iterable[Matrix]]
    place: tuple[dict[str, Any], str]  # the module's parameters, and its name there


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
        self._samples: list[Tensor] = []  # of what the session left in each
        self._few: list[tuple[Any, bytes] | None] = []  # a few numbers of each as NumPy sees them, and what they were
        self.moves = 0

    def exchange(self, first: Tensor, second: Tensor, expert: int | None = None) -> None:
        """Exchange channels in the weights and their gradients (see :func:`pop_mm.weights.exchange.swap_channels`)."""
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
            self._samples = [_sample(held.stored) for held in self._held]
            self._few = [_few_numbers(held.stored) for held in self._held]

    @torch.inference_mode(False)
    def _hold(self) -> None:
        owners: list[dict[str, Any]] = [module._parameters for module in self._record.modules]
        owners += [vars(weight) for owner in owners for weight in owner.values() if len(tensors_behind(weight)) > 1]
        places = {id(tensor): (owner, name) for owner in owners for name, tensor in owner.items()}
        self._held = [
            _Held(t.name, t.tensor, t.tensor.detach(), t.matrices, places[id(t.tensor)])
            for t in self._record.channel_tensors()
        ]

    def look(self) -> None:
        """Note if somebody has written to a weight since: whether in the original order, nobody can tell.

        A weight that was multiplied by one number is the same in every order. A plain weight that replaces one is taken as it
        is; any other was made of what stood there.
        """
        of = self._versions.of
        for held, sample, few in zip(self._held, self._samples, self._few, strict=False):
            owner, name = held.place
            if owner.get(name) is not held.parameter and type(owner.get(name)) is not type(held.parameter):
                self._versions.packed = self._versions.packed or held.name
            version = held.parameter._version
            replaced = held.parameter.data_ptr() != held.stored.data_ptr()
            written = of.get(id(held.parameter), version) != version and not replaced
            now = _sample(held.stored)
            written = written or not torch.equal(as_integers(now), as_integers(sample))  # through .data
            if few is not None and few[0].ctypes.data == held.stored.data_ptr():  # its memory is still there
                written = written or few[0].tobytes() != few[1]
            if written and self._versions.written is None and not _is_multiple(now, sample):
                self._versions.written = held.name

    @property
    def touched(self) -> bool:
        """Whether a few numbers of a weight are not those that the session left there. It costs next to nothing."""
        return any(few is not None and few[0].tobytes() != few[1] for few in self._few)

    @property
    def holds(self) -> bool:
        """Whether some channels stand elsewhere, or did until a moment ago."""
        return bool(self._held)

    @torch.inference_mode(False)
    @torch.no_grad()
    def adopt(self, positions: Mapping[int | None, Tensor]) -> None:
        """Before channels go back: take along weights that were made from the moved ones and put in their place.

        A loaded weight holds the channels in the original order. ``share_memory_()`` and ``Parameter(3 * module.weight)`` hold
        them as they stand now: those are known by being what stood there, times one number, and are taken along. What is only
        like it was made of it in a way that nobody can follow; that is noted, and refused.

        Parameters
        ----------
        positions : mapping
            Expert (None for a dense FFN) -> ``[D]``, the position of each original channel.
        """
        new = {t.name: t.tensor for t in self._record.channel_tensors()}
        for held in list(self._held):
            tensor = new[held.name]
            same = tensor.shape == held.stored.shape and tensor.is_floating_point() == held.stored.is_floating_point()
            if type(tensor) not in (Tensor, nn.Parameter) or not same:
                continue  # packed by somebody
            if tensor.data_ptr() == held.stored.data_ptr():
                continue
            made_of = origin(tensor.detach(), held.stored, held.matrices, positions)
            if made_of == "moved":
                self._held.append(_Held(held.name, tensor, tensor.detach(), held.matrices, held.place))
            elif made_of == "unclear":
                self._versions.packed = self._versions.packed or held.name

    def release(self) -> None:
        """All channels are back."""
        self._held, self._samples, self._few = [], [], []

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


@torch.inference_mode(False)
@torch.no_grad()
def _sample(tensor: Tensor) -> Tensor:
    """A copy of some of its numbers, side by side in memory."""
    line = tensor.reshape(-1) if tensor.numel() == max(tensor.shape, default=0) else tensor  # the scales of outputs
    while line.dim() > 1:
        line = line.select(max(range(line.dim()), key=line.stride), 0)
    return line[:256].clone()


def _few_numbers(tensor: Tensor) -> tuple[Any, bytes] | None:
    """A view of one number in each quarter of it (of each expert), and what they are; None off the CPU, where looking waits."""
    if not tensor.is_cpu or not tensor.numel():
        return None
    halves: Any = (..., *(slice(None, None, -(-size // 2)) for size in tensor.shape[-2:]))
    few = as_integers(tensor)[halves].numpy()
    return few, few.tobytes()


def _is_multiple(after: Tensor, before: Tensor) -> bool:
    """Whether all numbers were multiplied by the same one, which is not 1."""
    a, b = after.double(), before.double().to(after.device)
    factor = float((a * b).sum() / b.square().sum())
    if not after.is_floating_point():
        return False
    near = 4 * torch.finfo(after.dtype).eps
    return factor != 1 and bool(torch.isfinite(a).all()) and torch.allclose(a, factor * b, rtol=near, atol=0)


def before_moves(module: nn.Module, canonical: Callable[..., None], patches: Patches) -> None:
    """Call something before anybody takes a module's weights, loads others, or moves them."""
    patches.hook(module.register_state_dict_pre_hook(canonical))
    patches.hook(module.register_load_state_dict_pre_hook(canonical))
    patches.replace(module, "_apply", _after(canonical, module._apply))


def _after(first: Callable[[], None], own: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        first()
        return own(*args, **kwargs)

    return call
