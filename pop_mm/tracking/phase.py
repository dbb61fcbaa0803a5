"""Which part of a generation a forward belongs to. Knows ``generate()`` and caches; knows neither pruning nor models.

:class:`~pop_mm.tracking.generations.Generations` wraps the methods of ``generate``. The model gets one forward
pre-hook and one forward hook. Plain forwards are attributed by their cache.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..classes import is_a
from ..errors import PhaseError
from ..modality import Positions, positions_of
from ..patching import Patches
from .caches import cache_in, cache_of, follow_rows, known_length, leave_rows, use_cache
from .generations import Generations, Prepared, refuse_continuous_batching
from .row_adapters import remove_row_adapters

if TYPE_CHECKING:
    from .step import Step


class Phase(Enum):
    """What a forward does. MIXED: its first columns are prefill, the rest decode steps, all in one forward."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


_PAGED_CACHE = "transformers.generation.continuous_batching.cache:PagedAttentionCache"


@dataclass(eq=False)
class Forward:
    """One forward of the model, as seen by the FFNs.

    Attributes
    ----------
    phase : Phase
    state : Any
        The prompt's state, from :meth:`Handler.new_state`.
    rows, length : int
        B and q of this forward's input.
    valid : Tensor or None
        ``[B, q]`` boolean, false on padding and on rows that have finished; None if every position counts.
    positions : Positions or None
        The modality of each position of a prompt; None if all is text.
    decode_from : int or Tensor
        For MIXED: first decode column of this forward, for all rows or ``[B]``.
    next_chunk : bool
        A further chunk of a prompt whose prefill ``generate`` has split.
    past : int or None
        Tokens that the cache holds before this forward. None without a cache, and where a decode step would have to wait
        for the device to know.
    draft : bool
        A forward of the assistant of assisted decoding, which is fed again what is cropped off its prompt.
    fast : bool
        Set by the backend: FFNs may compute R and C only.
    few : bool
        Set by the backend: and the compiled library may, which takes one token of each of a few sequences and knows no autograd.
    partial : bool
        Set by the backend: FFNs complete the prompt on R and C only, as soon as they have ranked their channels.
    probes : Tensor or None
        Set by the backend: and they do so from gate and up on. ``[n]``, numbers of the positions that rank the channels.
    steps : dict of device to Step
        The forward's tokens as the algorithm takes them; filled in by the engine.
    """

    phase: Phase
    state: Any
    rows: int
    length: int
    valid: Tensor | None = None
    positions: Positions | None = None
    decode_from: int | Tensor = 0
    next_chunk: bool = False
    past: int | None = None
    draft: bool = False
    cache: Any = None
    fast: bool = False
    few: bool = False
    partial: bool = False
    probes: Tensor | None = None
    steps: dict[torch.device, Step] = field(default_factory=dict)

    @property
    def prompt_length(self) -> int:
        """Columns of this forward that hold prompt, in the row with the most."""
        if self.phase is not Phase.MIXED:
            return self.length if self.phase is Phase.PREFILL else 0
        return min(max(int(torch.as_tensor(self.decode_from).max()), 0), self.length)


class Handler(Protocol):
    """What the tracker needs from its owner."""

    def new_state(self, rows: int, cache: Any) -> Any:
        """State of a new prompt."""

    def begin(self, forward: Forward) -> None:
        """Called before the model's forward."""

    def end(self, forward: Forward, completed: bool) -> None:
        """Called after the model's forward, also if it raised."""


class PhaseTracker:
    """Attributes every forward of a model to a phase and a prompt.

    Parameters
    ----------
    model : nn.Module
        The model whose ``forward`` and ``generate`` the user calls.
    handler : Handler
    rows_matter : bool
        Whether states want to know (``select_rows``) when their cache's rows are exchanged.
    modality_token_ids : mapping of str to int
        Modality -> token id of its positions.
    """

    def __init__(
        self,
        model: nn.Module,
        handler: Handler,
        rows_matter: bool = False,
        modality_token_ids: Mapping[str, int] | None = None,
    ) -> None:
        self._model = model
        self._modality_token_ids = modality_token_ids or {}
        self._rows_matter = rows_matter
        self._handler = handler
        self._generations = Generations(model)
        self._local = threading.local()
        self._states: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._patches = Patches()
        self._signature = inspect.signature(model.forward)

    @property
    def current(self) -> Forward | None:
        """The forward that runs in this thread now."""
        return getattr(self._local, "current", None)

    @property
    def live(self) -> int:
        """How many caches are known."""
        return len(self._states)

    def install(self) -> None:
        """Wrap and hook the model."""
        self._generations.install(self._patches)
        self._patches.hook(self._model.register_forward_pre_hook(self._before, with_kwargs=True))
        self._patches.hook(self._model.register_forward_hook(self._after, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Undo :meth:`install` exactly."""
        self._patches.undo()
        for cache in list(self._states):
            leave_rows(cache)
        self._states.clear()

    @contextmanager
    def split(self, context_length: int | Tensor) -> Iterator[None]:
        """Within: columns before ``context_length`` are prefill, the others decode steps (int, or ``[B]``)."""
        if isinstance(context_length, bool) or not isinstance(context_length, int | Tensor):
            raise PhaseError(f"split() takes an int or a [B] tensor; got {type(context_length).__name__}.")
        if isinstance(context_length, Tensor) and (context_length.dim() != 1 or context_length.is_floating_point()):
            raise PhaseError(
                f"split() takes an integer tensor [B]; got {context_length.dtype} {tuple(context_length.shape)}."
            )
        previous = getattr(self._local, "split", None)
        self._local.split = context_length
        try:
            yield
        finally:
            self._local.split = previous

    def adopt(self, cache: Any, original: Any) -> None:
        """Let a copy of a cache continue the prompt of the original."""
        state = self._states.get(original)
        if state is None:
            raise PhaseError("adopt(): the original cache was not prefilled in this session.")
        self._bind(cache, state.copy(cache))

    def _bind(self, cache: Any, state: Any) -> None:
        """The state belongs to the cache, and follows it when its rows are exchanged."""
        self._states[cache] = state
        if self._rows_matter:
            follow_rows(cache, state.select_rows)

    # forwards -------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.current = None
        inputs = self._signature.bind_partial(*args, **kwargs).arguments if args else kwargs
        extra = inputs.get("kwargs")
        if isinstance(extra, dict):
            inputs = {**inputs, **extra}
        forward = self._attribute(inputs)
        self._handler.begin(forward)
        self._local.current = forward

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        forward, self._local.current = self.current, None
        if output is None:  # it raised, or was refused
            remove_row_adapters(self._model)
        if forward is None:
            return
        if output is not None and forward.cache is None:
            cache = cache_of(output)
            if cache is not None:
                forward.state.bind(cache)
                self._bind(cache, forward.state)
                forward.cache = cache
        self._handler.end(forward, output is not None)

    def around(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run what stands for a forward of the model without its hooks (a compiled step), attributed all the same."""
        self._before(self._model, args, kwargs)
        output = None
        try:
            output = step(*args, **kwargs)
            return output
        finally:
            self._after(self._model, args, kwargs, output)

    def forget(self, forward: Forward) -> None:
        """Drop the state of a forward's prompt."""
        if forward.cache is not None:
            self._states.pop(forward.cache, None)

    def _attribute(self, inputs: dict[str, Any]) -> Forward:
        prepared = self._generations.take_prepared()
        ids = inputs.get("input_ids")
        ids = inputs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            raise PhaseError("The forward has neither input_ids nor inputs_embeds.")
        rows, length = ids.shape[:2]
        if length == 0 or rows == 0:
            raise PhaseError(f"The prompt is empty: the input has shape {tuple(ids.shape)}. Give at least one token.")
        cache = cache_in(inputs)
        if "cu_seq_lens_q" in inputs or is_a(type(cache), _PAGED_CACHE):
            refuse_continuous_batching()
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise PhaseError(f"The cache must be a transformers Cache; got {type(cache).__name__}.")
        if prepared is not None and prepared.cache is not cache:
            prepared = None
        valid = _valid_positions(prepared.mask if prepared else inputs.get("attention_mask"), rows, length)
        ended = self._generations.ended(prepared)
        if ended is not None and len(ended) == rows:
            valid = _without_ended(valid, ended, rows, length)
        forward = Forward(Phase.PREFILL, None, rows, length, valid, cache=cache)
        split = getattr(self._local, "split", None)
        if split is not None:
            self._attribute_split(forward, split)
        elif cache is None and use_cache(self._model, inputs):
            forward.state, forward.past = self._handler.new_state(rows, None), 0
        elif cache is None:
            self._attribute_without_cache(forward, prepared)
        else:
            self._attribute_cached(forward, prepared)
        if self._modality_token_ids and forward.phase is not Phase.DECODE:
            forward.positions = positions_of(inputs, self._modality_token_ids, forward.past or 0)
        return forward

    def _attribute_split(self, forward: Forward, split: int | Tensor) -> None:
        past = 0 if forward.cache is None else int(forward.cache.get_seq_length())
        forward.state, forward.past = self._state(forward, past), past
        if isinstance(split, Tensor):
            if split.shape[0] != forward.rows:
                raise PhaseError(
                    f"split() was given {split.shape[0]} context lengths for a batch of {forward.rows} rows."
                )
            forward.phase, forward.decode_from = Phase.MIXED, split - past
        elif split - past >= forward.length:
            forward.phase = Phase.PREFILL
        else:
            forward.phase, forward.decode_from = Phase.MIXED, max(split - past, 0)
            if forward.decode_from == 0:
                if past == 0:
                    raise PhaseError(
                        f"split({split}) leaves no column for the context, so there is no prompt to prune by."
                    )
                forward.phase = Phase.DECODE

    def _attribute_without_cache(self, forward: Forward, prepared: Prepared | None) -> None:
        """use_cache=False: within generate, what lies beyond the first call's length is decode, in one forward."""
        forward.state = self._handler.new_state(forward.rows, None)
        stream, generation = "conditional", prepared.generation if prepared is not None else None
        if prepared is None:  # classifier-free guidance calls the model by itself
            stream, generation = "unconditional", self._generations.running()
            if generation is not None and not generation.wrapped:
                return
        if generation is None:
            return
        first = generation.first_length.setdefault(stream, forward.length)
        if forward.length > first:
            forward.phase, forward.decode_from = Phase.MIXED, first

    def _attribute_cached(self, forward: Forward, prepared: Prepared | None) -> None:
        state = self._states.get(forward.cache)
        generation = None if prepared is None else prepared.generation
        forward.draft = generation is not None and generation.draft
        if prepared is not None and not prepared.first and state is not None:
            forward.state, forward.phase, forward.past = state, Phase.DECODE, known_length(forward.cache)
            return
        forward.past = past = int(forward.cache.get_seq_length())
        forward.state = self._state(forward, past)
        if past and (prepared is None or not prepared.first) and forward.length == 1:
            forward.phase = Phase.DECODE
            return
        if prepared is not None and prepared.first:
            if generation is not None:
                forward.next_chunk = generation.prefills > 0
                generation.prefills += 1
            if 0 < prepared.candidates < forward.length:
                # assisted decoding: the first forward holds the prompt and the candidate tokens behind it
                forward.phase, forward.decode_from = Phase.MIXED, forward.length - prepared.candidates

    def _state(self, forward: Forward, past: int) -> Any:
        cache = forward.cache
        state = self._states.get(cache) if cache is not None else None
        if past == 0:
            state = self._handler.new_state(forward.rows, cache)
            if cache is not None:
                self._bind(cache, state)
        elif state is None:
            raise PhaseError(
                f"The cache holds {past} tokens that this session has not seen, so there is no partition for them. Prefill "
                "inside the session; for a copy of a cache that was prefilled here, call session.adopt(copy, original)."
            )
        return state


def _valid_positions(mask: Any, rows: int, length: int) -> Tensor | None:
    """``[B, q]`` boolean of the positions that hold a real token, or None if all do (or nothing says otherwise)."""
    if isinstance(mask, dict):  # one mask for each type of layer; the widest view of the keys is the full one
        mask = next((m for m in mask.values() if m is not None), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        if mask.shape[0] != rows or mask.shape[1] < length:
            return None
        valid = mask[:, -length:].bool()
    else:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        valid = seen.any(1).any(-1)[:, -length:].expand(rows, -1)
    if valid.device.type == "cpu" and bool(valid.all()):
        return None
    return valid


def _without_ended(valid: Tensor | None, ended: Tensor, rows: int, length: int) -> Tensor | None:
    """Positions of rows that had finished do not count."""
    if ended.device.type == "cpu" and not bool(ended.any()):
        return valid
    count = min(length, ended.shape[1])
    result = torch.ones(rows, length, dtype=torch.bool, device=ended.device) if valid is None else valid.clone()
    result[:, length - count :] &= ~ended[:, ended.shape[1] - count :]
    return result
