"""The fast backend: R and C stand first in the model's own weights, and decode runs on narrow views of them.

Reordering an FFN's channels does not change its function, so there is no second copy of any weight. One prompt's order is
resident at a time; any other prompt decodes through the reference path on the same, reordered weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Engine, PromptState
from ..layout import FFN, Projection
from ..phase import PhaseTracker
from .base import current_forward


class ChannelOrder:
    """The present order of one FFN's channels in its weights.

    Attributes
    ----------
    channel_at : Tensor
        ``[D]``: original channel at each position.
    position_of : Tensor
        ``[D]``: position of each original channel.
    moved : bool
        Whether the order differs from the original one.
    """

    def __init__(self, ffn: FFN) -> None:
        self._ffn = ffn
        self.channel_at = torch.arange(ffn.size, device=ffn.down.weight.device)
        self.position_of = self.channel_at.clone()
        self.moved = False

    def misplaced(self, front: Tensor) -> Tensor:
        """``[D]`` boolean over positions: those that must be exchanged to bring channels ``front`` to the first places."""
        wanted = torch.zeros(self._ffn.size, dtype=torch.bool, device=front.device)
        wanted[self.position_of[front]] = True
        wanted[: len(front)] ^= True
        return wanted

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Exchange the channels at positions ``first[i]`` and ``second[i]``."""
        if not len(first):
            return
        self.moved = True
        self._ffn.swap(first, second)
        at = self.channel_at.clone()
        at[first], at[second] = self.channel_at[second], self.channel_at[first]
        self.channel_at = at
        self.position_of = torch.empty_like(at).scatter_(0, at, torch.arange(len(at), device=at.device))

    def restore(self) -> None:
        """Put every channel back: bit for bit, since only whole channels were ever exchanged."""
        if not self.moved:
            return
        for first, second in _involutions(self.channel_at.tolist()):
            device = self.channel_at.device
            self.swap(torch.tensor(first, device=device), torch.tensor(second, device=device))
        assert bool((self.channel_at[1:] > self.channel_at[:-1]).all())
        self.moved = False


def _involutions(channel_at: list[int]) -> list[tuple[list[int], list[int]]]:
    """Two rounds of disjoint swaps that sort a permutation: every cycle is a product of two reflections."""
    rounds: list[tuple[list[int], list[int]]] = [([], []), ([], [])]
    seen = [False] * len(channel_at)
    for start in range(len(channel_at)):
        cycle = []
        position = start
        while not seen[position]:
            seen[position] = True
            cycle.append(position)
            position = channel_at[position]
        n = len(cycle)
        # content of cycle[i] belongs to cycle[i + 1]: reflect i <-> n - 1 - i, then i <-> n - i
        for (firsts, seconds), total in zip(rounds, (n - 1, n), strict=True):
            for i in range(n):
                j = (total - i) % n
                if i < j:
                    firsts.append(cycle[i])
                    seconds.append(cycle[j])
    return rounds


class InplaceBackend:
    """Reorders channels in the weights at the first decode step of a prompt, and decodes on narrow views.

    Attributes
    ----------
    seconds : float
        Time spent moving channels.
    moved_channels : int
        Channels moved so far.
    """

    name = "inplace"

    def __init__(self, engine: Engine, tracker: PhaseTracker) -> None:
        self._engine = engine
        self._tracker = tracker
        self._orders: dict[int, ChannelOrder] = {}
        self._places: dict[int, Tensor] = {}
        self._resident: PromptState | None = None
        self._undo: list[Callable[[], object]] = []
        self.seconds = 0.0
        self.moved_channels = 0

    def attach(self, index: int) -> None:
        """Take over the projections of FFN number ``index`` of the engine."""
        ffn = self._engine.ffns[index]
        order = self._orders[index] = ChannelOrder(ffn)

        def canonical(*_: Any) -> None:
            self._resident = None
            order.restore()

        for projection in ffn.projections:
            module = projection.module
            forward = self._down_forward(index) if projection is ffn.down else self._input_forward(index, projection)
            module.forward = forward
            self._undo.append(lambda module=module: module.__dict__.pop("forward", None))
            self._undo.append(module.register_state_dict_pre_hook(canonical).remove)
            self._undo.append(module.register_load_state_dict_pre_hook(canonical).remove)

    def detach(self) -> None:
        """Restore the original order and the modules' own forwards."""
        self._resident = None
        for order in self._orders.values():
            order.restore()
        while self._undo:
            self._undo.pop()()

    def place(self, state: PromptState) -> bool:
        """Bring a prompt's R and C to the front, if it may be the resident one.

        A new prompt always becomes resident. An older one does only if the resident prompt's cache is gone.

        Returns
        -------
        bool
            Whether the state is resident now.
        """
        if self._resident is state and state.moved:
            return True
        if state.moved and self._resident is not None and self._resident.alive:
            return False
        started = time.perf_counter()
        # one transfer to the host for all FFNs: how many channels move is not known before
        fronts = {index: state.ffns[index].partition.front() for index in self._orders}
        misplaced = [self._orders[index].misplaced(front) for index, front in fronts.items()]
        on_host = torch.cat([m.cpu() if m.device.type == "cpu" else m for m in misplaced]).cpu() if misplaced else None
        offset = 0
        for (index, front), m in zip(fronts.items(), misplaced, strict=True):
            order = self._orders[index]
            assert on_host is not None
            wrong = on_host[offset : offset + len(m)].nonzero().squeeze(-1)
            offset += len(m)
            pairs = len(wrong) // 2  # as many to bring in as to take out; positions before |front| come first
            order.swap(wrong[:pairs].to(m.device), wrong[pairs:].to(m.device))
            self.moved_channels += 2 * pairs
            candidates = state.ffns[index].partition.candidates
            self._places[index] = order.position_of[candidates]
        state.moved = True
        self._resident = state
        self.seconds += time.perf_counter() - started
        return True

    def _input_forward(self, index: int, projection: Projection) -> Callable[[Tensor], Tensor]:
        width = self._engine.sizes[index].width
        own_forward = type(projection.module).forward
        module: nn.Module = projection.module
        local = self._tracker

        def forward(x: Tensor) -> Tensor:
            current = local.current
            if current is not None and current.fast:
                return projection.narrow_forward(x, width)
            return own_forward(module, x)

        return forward

    def _down_forward(self, index: int) -> Callable[[Tensor], Tensor]:
        ffn = self._engine.ffns[index]
        projection, module = ffn.down, ffn.down.module
        own_forward = type(module).forward
        width = self._engine.sizes[index].width
        engine, order, places = self._engine, self._orders[index], self._places

        def forward(h: Tensor) -> Tensor:
            current = current_forward(self._tracker, ffn)
            if not current.fast:
                return own_forward(module, engine.apply(index, current, h, order.position_of if order.moved else None))
            rows = h.view(current.rows, current.length, width)
            chosen = places[index]
            dropped = engine.select(index, current, rows.index_select(-1, chosen))
            if dropped is not None:
                rows = rows.scatter(-1, chosen[dropped].expand(current.rows, -1, -1), 0)
            return projection.narrow_forward(rows.view(h.shape), width)

        return forward
