"""The fast backend: R, then C stand first in the model's own weights, and decode runs on narrow views of them.

Reordering an FFN's channels does not change its function, so there is no second copy of any weight. One prompt's order is
resident at a time; any other prompt decodes through the reference path on the same, reordered weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine import Engine, PromptState
from ..layout import FFN, Projection, linear
from ..partition import Partition, Sizes
from ..phase import Forward, PhaseTracker
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

    def target_zones(self, partition: Partition) -> Tensor:
        """``[D]``: for each position the zone where its channel belongs: 0 retained, 1 candidate, 2 pruned."""
        zones = torch.zeros_like(self.channel_at, dtype=torch.uint8)
        zones[self.position_of[partition.candidates]] = 1
        zones[self.position_of[partition.pruned]] = 2
        return zones

    def swap(self, first: Tensor, second: Tensor) -> None:
        """Exchange the channels at positions ``first[i]`` and ``second[i]``."""
        if not len(first):
            return
        self.moved = True
        first, second = first.to(self.channel_at.device), second.to(self.channel_at.device)
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
            self.swap(torch.tensor(first), torch.tensor(second))
        assert bool((self.channel_at[1:] > self.channel_at[:-1]).all())
        self.moved = False


def zone_swaps(zones: Tensor, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
    """The fewest exchanges that bring every channel into its zone, as two rounds of disjoint swaps.

    Parameters
    ----------
    zones : Tensor
        ``[D]`` on the host, from :meth:`ChannelOrder.target_zones`.
    """
    here = torch.tensor([0, 1, 2], dtype=zones.dtype).repeat_interleave(
        torch.tensor([sizes.retained, sizes.candidates, sizes.pruned])
    )
    strayed = {(i, j): ((here == i) & (zones == j)).nonzero().squeeze(-1) for i in range(3) for j in range(3) if i != j}
    firsts, seconds = [], []
    for i, j in ((0, 1), (0, 2), (1, 2)):  # pairs that are each in the other's zone
        n = min(len(strayed[i, j]), len(strayed[j, i]))
        firsts.append(strayed[i, j][:n])
        seconds.append(strayed[j, i][:n])
        strayed[i, j], strayed[j, i] = strayed[i, j][n:], strayed[j, i][n:]
    # what is left runs round the three zones one way or the other, and takes two exchanges each
    around = ((0, 1), (1, 2), (2, 0)) if len(strayed[0, 1]) else ((0, 2), (2, 1), (1, 0))
    a, b, c = (strayed[edge] for edge in around)
    return [(torch.cat([*firsts, a]), torch.cat([*seconds, b])), (a, c)]


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


class ResidentCandidates(NamedTuple):
    """The candidates as they stand in the weights, right behind the retained channels.

    Attributes
    ----------
    ranks : Tensor
        ``[|C|]``: which of the candidates in ascending order stands at each place.
    weight : Tensor
        ``[|C|]``: the scorer's weight of the one at each place.
    choose : callable
        :meth:`Engine.chooser` for them.
    """

    ranks: Tensor
    weight: Tensor
    choose: Callable[[Tensor], Tensor]


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
        self._candidates: dict[int, ResidentCandidates] = {}
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

        replaced = [(p.module, self._input_forward(index, p)) for p in ffn.inputs]
        replaced.append((ffn.down.module, self._down_forward(index)))
        if ffn.holder is not None and direct_forward_fits(ffn):
            replaced.append((ffn.holder, self._holder_forward(index)))
        for module, forward in replaced:
            module.forward = forward
            self._undo.append(partial(module.__dict__.pop, "forward", None))
        for projection in ffn.projections:
            self._undo.append(projection.module.register_state_dict_pre_hook(canonical).remove)
            self._undo.append(projection.module.register_load_state_dict_pre_hook(canonical).remove)

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
        partitions = {index: self._engine.partition(index, state) for index in self._orders}
        zones = [self._orders[index].target_zones(part) for index, part in partitions.items()]
        # one transfer to the host for all FFNs: how many channels move is not known before
        on_host = torch.cat([z.to(zones[0].device) for z in zones]).cpu().split([len(z) for z in zones])
        for (index, part), zone in zip(partitions.items(), on_host, strict=True):
            order = self._orders[index]
            for first, second in zone_swaps(zone, part.sizes):
                order.swap(first, second)
                self.moved_channels += 2 * len(first)
            resident = order.channel_at[part.sizes.retained : part.sizes.width]
            ranks = torch.searchsorted(part.candidates, resident)
            weight = state.ffns[index].candidate_weight
            assert weight is not None
            weight = weight[ranks]
            choose = self._engine.chooser(index, state, weight, ranks)
            self._candidates[index] = ResidentCandidates(ranks, weight, choose)
        state.moved = True
        self._resident = state
        self.seconds += time.perf_counter() - started
        return True

    def _input_forward(self, index: int, projection: Projection) -> Callable[[Tensor], Tensor]:
        tracker, module = self._tracker, projection.module
        own_forward = type(module).forward
        narrow = projection.narrow(self._engine.sizes[index].width)

        def forward(x: Tensor) -> Tensor:
            current = tracker.current
            if current is not None and current.fast:
                return narrow(x)
            return own_forward(module, x)

        return forward

    def _down_forward(self, index: int) -> Callable[[Tensor], Tensor]:
        ffn, sizes = self._engine.ffns[index], self._engine.sizes[index]
        tracker, module = self._tracker, ffn.down.module
        own_forward = type(module).forward
        narrow = ffn.down.narrow(sizes.width)
        engine, order = self._engine, self._orders[index]
        has_candidates = sizes.candidates > 0

        def forward(h: Tensor) -> Tensor:
            current = current_forward(tracker, ffn)
            if not current.fast:
                return own_forward(module, engine.apply(index, current, h, order.position_of if order.moved else None))
            if has_candidates:
                if h.requires_grad:
                    h = h.clone()
                zero_dropped(h, current)
            return narrow(h)

        zero_dropped = self._zero_dropped(index)
        return forward

    def _zero_dropped(self, index: int) -> Callable[[Tensor, Forward], None]:
        """What zeroes, in place, the candidates that a step leaves out of ``h``, ``[..., K]``."""
        engine, resident = self._engine, self._candidates
        retained, count = engine.sizes[index].retained, engine.sizes[index].candidates

        def zero_dropped(h: Tensor, current: Forward) -> None:
            here = resident[index]
            if current.rows == current.length == 1:  # the common step
                alone = h.view(1, -1).narrow(1, retained, count)
                alone.scatter_(1, here.choose(alone), 0)
                return
            candidates = h.view(current.rows, current.length, -1)[..., retained:]
            dropped = engine.select(index, current, candidates, here.weight, here.ranks)
            candidates.scatter_(-1, dropped.expand(current.rows, -1, -1), 0)

        return zero_dropped

    def _holder_forward(self, index: int) -> Callable[..., Tensor]:
        """The whole FFN of a decode step in one function.

        Calling three modules costs as much as a fifth of a small FFN: their Python objects have left the cache since
        the layer before. Hooks on the projections are respected: then the module's own forward runs.
        """
        ffn, sizes, tracker = self._engine.ffns[index], self._engine.sizes[index], self._tracker
        holder, weight = ffn.holder, ffn.down.weight
        assert holder is not None
        own_forward = type(holder).forward
        bypassed = [*(p.module for p in ffn.projections), ffn.activation]
        hooks = [h for m in bypassed if m is not None for h in (m._forward_hooks, m._forward_pre_hooks)]
        parameters = ffn.down.module._parameters
        compute = direct_forward(ffn, sizes.width, self._zero_dropped(index) if sizes.candidates else None)
        address = weight.data_ptr()

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal compute, weight, address
            current = tracker.current
            if current is None or not current.fast or any(hooks):
                return own_forward(holder, x, *args, **kwargs)
            if parameters["weight"] is not weight or weight.data_ptr() != address:
                weight = ffn.down.weight
                address = weight.data_ptr()
                compute = direct_forward(ffn, sizes.width, self._zero_dropped(index) if sizes.candidates else None)
            return compute(x, current)

        return forward


def direct_forward(
    ffn: FFN, width: int, zero_dropped: Callable[[Tensor, Forward], None] | None
) -> Callable[[Tensor, Forward | None], Tensor]:
    """An FFN as one function on views of its first ``width`` channels: ``act(gate) * up`` or ``act(up)``, then down."""
    inputs = [view for p in ffn.inputs for view in p.narrow_views(width)]
    gate, gate_bias = inputs[0]
    up, up_bias = inputs[1] if len(inputs) == 2 else (None, None)
    (down, down_bias) = ffn.down.narrow_views(width)[0]
    assert ffn.activation is not None
    activation = ffn.activation.forward

    def compute(x: Tensor, current: Forward | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = activation(linear(rows, gate, gate_bias))
        if up is not None:
            up_rows = linear(rows, up, up_bias)
            h = h * up_rows if h.requires_grad else h.mul_(up_rows)
        if zero_dropped is not None:
            assert current is not None
            if h.requires_grad:
                h = h.clone()
            zero_dropped(h, current)
        return linear(h, down, down_bias).view(x.shape)

    return compute


@torch.no_grad()
def direct_forward_fits(ffn: FFN) -> bool:
    """Whether the holder's forward is just that, as far as one random token can tell."""
    holder, weight = ffn.holder, ffn.down.weight
    if holder is None or ffn.activation is None or "forward" in holder.__dict__:
        return False
    x = torch.randn(1, 1, ffn.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        expected = holder(x)
        found = direct_forward(ffn, ffn.size, None)(x, None)
    except Exception:  # a holder that wants more than x is left to its own forward
        return False
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return False
    scale = float(expected.abs().max())
    return math.isfinite(scale) and torch.allclose(
        expected, found, rtol=0, atol=scale * 50 * torch.finfo(expected.dtype).eps
    )
