"""What a decode step needs when it is compiled or captured as a graph: the same addresses at every step of every prompt.

The eager step looks up the prompt that is resident; a compiled one has read all that once, when it was traced. So whatever
changes from prompt to prompt, or from step to step, is copied into tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..decoding.channel_engine import ChannelEngine
from ..decoding.state import PromptState
from ..ops.select import choose
from ..tracking.phase import Forward

_STEPS = 32  # kept before they are handed to the step logs


class StaticSteps:
    """The candidates' weights of the resident prompt, and a log of what the steps left out, at fixed addresses.

    Attributes
    ----------
    active : bool
        Whether the step that runs now (or is being traced) is a compiled one.
    """

    def __init__(self, engine: ChannelEngine) -> None:
        self._engine = engine
        self.active = False
        self._weights: dict[int, Tensor] = {}  # [|C|]
        self._logs: dict[int, Tensor] = {}  # [32, n]
        self._ranks: dict[int, Tensor] = {}
        self._tokens: dict[int, Tensor] = {}  # [E]: how many each expert saw
        self._slots: dict[torch.device, Tensor] = {}  # [1]: where the step goes in the logs
        self._valid: dict[torch.device, Tensor] = {}  # [B, 1]: rows that count
        self._state: PromptState | None = None  # whose steps the logs hold
        self._count = 0

    @torch.inference_mode(False)  # buffers that may be written in and out of inference mode
    def load(self, index: int, weight: Tensor, ranks: Tensor) -> None:
        """Another prompt's candidates of FFN number ``index`` as they stand in the weights, ``[|C|]`` each."""
        if index not in self._weights:
            sizes, device = self._engine.sizes[index], weight.device
            self._weights[index] = fixed(torch.empty(weight.shape, dtype=weight.dtype, device=device))
            self._logs[index] = fixed(torch.zeros(_STEPS, sizes.candidates_dropped, dtype=torch.int64, device=device))
            self._slots.setdefault(device, fixed(torch.zeros(1, dtype=torch.int64, device=device)))
        self._weights[index].copy_(weight)
        self._ranks[index] = ranks

    def load_experts(self, index: int) -> None:
        """Count the tokens of the experts that are number ``index`` of the FFNs."""
        experts = self._engine.ffns[index]
        self._tokens[index] = fixed(torch.zeros(experts.channel_shape[0], dtype=torch.int64, device=experts.device))

    @contextmanager
    def step(self, forward: Forward) -> Iterator[None]:
        """Around one compiled step."""
        if self._state is not forward.state or self._count == _STEPS:
            self.flush()
            self._state = forward.state
        for device, slot in self._slots.items():
            slot.fill_(self._count)
            if forward.rows > 1:
                self._load_valid(forward, device)
        self._count += 1
        self.active = True
        try:
            yield
        finally:
            self.active = False

    @torch.inference_mode(False)
    def _load_valid(self, forward: Forward, device: torch.device) -> None:
        if device not in self._valid or len(self._valid[device]) != forward.rows:
            self._valid[device] = fixed(torch.empty(forward.rows, 1, dtype=torch.bool, device=device))
        self._valid[device].copy_(torch.tensor(True) if forward.valid is None else forward.valid)

    def flush(self) -> None:
        """Hand the steps so far to the logs of their prompt."""
        if self._state is not None and self._count:
            for index, log in self._logs.items():
                self._state.ffns[index].steps.add(log[: self._count].clone(), self._ranks[index])
            for index, tokens in self._tokens.items():
                experts = self._state.ffns[index]
                experts.decode_tokens = [a + b for a, b in zip(experts.decode_tokens, tokens.tolist(), strict=True)]
                tokens.zero_()
        self._count, self._state = 0, None

    def count(self, index: int, experts: Tensor) -> None:
        """One token went to each of ``experts``, ``[k]``."""
        self._tokens[index].index_add_(0, experts, torch.ones_like(experts))

    def without_dropped(self, index: int, h: Tensor) -> Tensor:
        """``[N, K]``, zero on the candidates that this step leaves out: what :meth:`ChannelEngine.choose` does, traceable.

        N are the rows of a batch that share one choice.
        """
        sizes, weight = self._engine.sizes[index], self._weights[index]
        candidates = h[:, sizes.retained :]
        together = valid = None
        if len(h) > 1:
            together = torch.zeros(len(h), dtype=torch.int64, device=h.device)
            valid = self._valid[h.device].squeeze(1)
        dropped = choose(candidates, weight, sizes.candidates_dropped, together, 1, valid)
        self._logs[index].index_copy_(0, self._slots[h.device], dropped)
        kept = candidates.scatter(1, dropped.expand(len(h), -1), 0)
        return torch.cat([h[:, : sizes.retained], kept], 1)


def fixed(tensor: Tensor) -> Tensor:
    """Tell the compiler that this tensor stays where it is, so that a captured graph need not copy it."""
    torch._dynamo.mark_static_address(tensor)
    return tensor
