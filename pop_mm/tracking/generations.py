"""The ``generate`` calls of a model, by thread: what they say about the forwards that they make.

Four instance methods are wrapped: ``generate`` (it tells where a generation begins and ends),
``_get_stopping_criteria`` (every generation calls it with its final config, also one that does not come through our
``generate``), ``_get_candidate_generator`` (assisted decoding alone calls it) and ``prepare_inputs_for_generation`` (it alone
tells a prefill chunk of one token from a decode step).
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PhaseError
from ..patching import Patches
from .caches import cache_in


@dataclass
class Generation:
    """One running ``generate`` call of a thread.

    Attributes
    ----------
    stop_ids : tuple of int
        Tokens that end a row.
    wrapped : bool
        It came through our ``generate``, which says when it ends; any other ends when its config is gone.
    config : weakref.ref or None
        Its final generation config, a copy that lives as long as the call.
    draft : bool
        It is the assistant of another generation.
    guided : bool
        It calls the model by itself for the prompt without guidance.
    ended : Tensor or None
        ``[B, n]``, boolean: which of the latest columns are of rows that had finished.
    assisted_from : int or None
        Columns of the prompt, if candidate tokens are appended to it (assisted decoding).
    prompt_length : int or None
        Columns of the ids before the first decode step.
    prefills : int
        Prefill forwards so far.
    first_length : dict of str to int
        Without a cache: length of the first forward, for the conditional and the unconditional branch.
    """

    stop_ids: tuple[int, ...] = ()
    wrapped: bool = False
    config: weakref.ref[Any] | None = None
    draft: bool = False
    guided: bool = False
    ended: Tensor | None = None
    assisted_from: int | None = None
    prompt_length: int | None = None
    prefills: int = 0
    first_length: dict[str, int] = field(default_factory=dict)

    @property
    def configured(self) -> bool:
        """Whether its config is known, and still in use."""
        return self.config is not None and self.config() is not None


@dataclass
class Prepared:
    """What ``prepare_inputs_for_generation`` said about the forward that follows it."""

    cache: Any
    first: bool
    mask: Tensor | None
    ended: Tensor | None
    generation: Generation | None
    candidates: int


class Generations:
    """The running ``generate`` calls of one model, by thread."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._local = threading.local()

    def install(self, patches: Patches) -> None:
        """Wrap the model's methods."""
        for name, wrap in (
            ("generate", self._wrap_generate),
            ("_get_stopping_criteria", self._wrap_stopping_criteria),
            ("_get_candidate_generator", self._wrap_candidate_generator),
            ("prepare_inputs_for_generation", self._wrap_prepare),
        ):
            original = getattr(self._model, name, None)
            if original is not None:
                patches.replace(self._model, name, functools.wraps(original)(wrap(original)))
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(self._model, name):  # it runs forwards in a thread of its own, which would swallow the error
                patches.replace(self._model, name, refuse_continuous_batching)

    def take_prepared(self) -> Prepared | None:
        """What was said about the forward that begins now; None if nothing was."""
        prepared, self._local.prepared = getattr(self._local, "prepared", None), None
        return prepared

    def ended(self, prepared: Prepared | None) -> Tensor | None:
        """Rows of this forward that have finished; without guidance the same ones have as with it."""
        if prepared is not None:
            return prepared.ended
        generation = self.running()
        return generation.ended if generation is not None and generation.guided else None

    def running(self) -> Generation | None:
        """The innermost ``generate`` call of this thread."""
        generations = self._generations()
        while generations and not (generations[-1].wrapped or generations[-1].configured):
            generations.pop()
        return generations[-1] if generations else None

    def _wrap_generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def generate(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            configs = given.get("generation_config"), getattr(self._model, "generation_config", None)
            sources = [given, *(getattr(config, "__dict__", {}) for config in configs)]
            running = self._generations()
            before = len(running)
            running.append(Generation(_stop_ids(sources, given.get("stopping_criteria")), wrapped=True))
            try:
                return original(*args, **kwargs)
            finally:
                del running[before:]
                self._local.prepared = None

        return generate

    def _wrap_stopping_criteria(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def _get_stopping_criteria(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            config = given.get("generation_config")
            if config is not None:
                self._configure(config, _stop_ids([vars(config)], given.get("stopping_criteria")))
            return original(*args, **kwargs)

        return _get_stopping_criteria

    def _wrap_candidate_generator(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def _get_candidate_generator(*args: Any, **kwargs: Any) -> Any:
            given = _by_name(signature, args, kwargs)
            config, ids = given.get("generation_config"), given.get("input_ids")
            running = self.running()
            if config is not None and (running is None or running.config is None or running.config() is not config):
                running = self._configure(config, ())  # batch 1: no row outlives another
            if running is not None and isinstance(ids, Tensor):
                running.assisted_from = ids.shape[1]
            return original(*args, **kwargs)

        return _get_candidate_generator

    def _configure(self, config: Any, stop_ids: tuple[int, ...]) -> Generation:
        """A generation begins in this thread: that of our ``generate`` or, if it has its config, one within or without it."""
        running, top = self._generations(), self.running()
        wrapped = top is not None and top.wrapped and not top.configured
        guided = getattr(config, "guidance_scale", None) not in (None, 1)
        if not wrapped and guided and config.use_cache is False:
            raise PhaseError(
                "This generate was not called on the model as it is within the session (it was taken from the model before, or "
                "from its class). Without a cache, guidance_scale then leaves unknown which forwards are of the prompt without "
                "guidance. Call model.generate(...) inside the session, or use a cache."
            )
        draft = bool(getattr(config, "is_assistant", False))
        generation = Generation(stop_ids, wrapped, weakref.ref(config), draft, guided)
        if wrapped:
            running.pop()
        running.append(generation)
        return generation

    def _wrap_prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
            inputs = original(*args, **kwargs)
            self._local.prepared = self._read_prepared(args[0] if args else kwargs.get("input_ids"), kwargs, inputs)
            return inputs

        return prepare_inputs_for_generation

    def _generations(self) -> list[Generation]:
        if not hasattr(self._local, "generations"):
            self._local.generations = []
        generations: list[Generation] = self._local.generations
        return generations

    def _read_prepared(self, ids: Tensor | None, kwargs: dict[str, Any], inputs: dict[str, Any]) -> Prepared:
        first = bool(kwargs.get("is_first_iteration"))
        mask = kwargs.get("attention_mask")
        ended = None
        candidates = 0
        generation = self.running()
        if generation is not None and ids is not None:
            if not first and ids.shape[0] > 1:
                if generation.prompt_length is None:
                    generation.prompt_length = ids.shape[1] - 1
                generated = ids[:, generation.prompt_length :]
                if generation.stop_ids and generated.shape[1]:
                    stop = torch.tensor(generation.stop_ids, device=ids.device)
                    ended = torch.isin(generated, stop).cumsum(-1) > 0
            elif first and generation.assisted_from is not None and inputs.get("inputs_embeds") is None:
                candidates = ids.shape[1] - generation.assisted_from
            generation.ended = ended
        return Prepared(cache_in(inputs), first, mask, ended, generation, candidates)


def refuse_continuous_batching(*_: Any, **__: Any) -> None:
    """Raise :class:`PhaseError`, saying what to do instead."""
    raise PhaseError(
        "Continuous batching packs tokens of several requests, some in prefill and some in decode, into one row "
        "without saying which is whose, so pop_mm cannot attribute them. Use generate() with a batch instead."
    )


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their names, however they were given; of a call that does not fit, those given by name."""
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError:  # the function itself says so better
        return kwargs
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given = {**given, **given.pop(name, {})}
    return given


def _stop_ids(sources: Sequence[Mapping[str, Any]], criteria: Any) -> tuple[int, ...]:
    """Ids of one generate call that end a row: end-of-sequence, and padding where other criteria can end a row too.

    Without an end-of-sequence id generate feeds no padding. Of the sources, the first that knows an id counts.
    """

    def ids(name: str) -> list[int]:
        value: Any = next((s[name] for s in sources if s.get(name) is not None), [])
        if isinstance(value, Tensor):
            value = value.tolist()
        return list(value) if isinstance(value, list | tuple) else [value]

    ends = ids("eos_token_id")
    if ends and (ids("stop_strings") or criteria):
        ends += ids("pad_token_id")
    return tuple(ends)


__all__ = ["Generation", "Generations", "Prepared", "refuse_continuous_batching"]
