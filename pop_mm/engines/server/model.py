"""The model that a server has: loaded once, with the session that the request of the moment wants."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from ...errors import AdapterError, ConfigError
from ...inputs import context_of
from ...samples import load, load_config, load_vision, takes_images
from ...session.session import Session, prune
from ...settings.config import PopConfig
from .errors import RequestError
from .line import Job
from .metrics import Metrics

_MOST_REFUSALS = 256  # settings that are remembered as impossible


class ServedModel:
    """A model, what reads its prompts, and the session on it. All but reading its attributes happens in one thread.

    Parameters
    ----------
    name : str
        What requests call it.
    model : PreTrainedModel
        In eval mode.
    reader : processor or tokenizer
        What :func:`~pop_mm.samples.load_vision` or :func:`~pop_mm.samples.load` returned beside the model.
    config : PopConfig
        For requests that ask for nothing else.
    metrics : Metrics, optional

    Raises
    ------
    RequestError
        The model cannot chat: no chat template, or a tokenizer whose tokens cannot be streamed.
    """

    def __init__(
        self, name: str, model: PreTrainedModel, reader: Any, config: PopConfig, metrics: Metrics | None = None
    ) -> None:
        self.name, self.model, self.reader, self.config = name, model, reader, config
        self.takes_images = takes_images(model.config) and hasattr(reader, "tokenizer")
        self.tokenizer = reader.tokenizer if self.takes_images else reader
        self.metrics = metrics or Metrics()
        context = context_of(model)
        self.context = None if context is None else context.tokens
        self._session: Session | None = None
        self._refusals: dict[str, str] = {}
        if not reader.chat_template:
            raise RequestError(
                400, f"{name} has no chat template, so it cannot answer chats. Take one that was tuned for them."
            )
        if not hasattr(self.tokenizer, "_tokenizer"):
            kind = type(self.tokenizer).__name__
            raise RequestError(
                400, f"{name} has a {kind}, whose tokens cannot be streamed. Take a model with a tokenizer.json."
            )

    @classmethod
    def load(
        cls, name: str, config: PopConfig, *, dtype: Any = "auto", device: Any = None, weights: str = "auto"
    ) -> ServedModel:
        """Load a model as :func:`pop_mm.samples.load` does; with images if the model takes them. Raises ``SampleError``."""
        loader = load_vision if takes_images(load_config(name)) else load
        return cls(name, *loader(name, dtype=dtype, device=device, weights=weights), config)

    def check(self, config: PopConfig) -> None:
        """Raise ``RequestError`` for settings that were refused before."""
        if (said := self._refusals.get(config.to_json())) is not None:
            raise _refusal(said)

    def use(self, config: PopConfig) -> None:
        """Let the model run with these settings from now on; a budget of 1 or a ratio of 0 is the model as it is.

        Raises
        ------
        RequestError
            400: the settings do not fit the model. The model is dense then.
        """
        wanted = None if is_dense(config) else config
        found = None if self._session is None else self._session.config
        if wanted == found:
            return
        self.close()
        self.metrics.add("pop_mm_session_changes_total")
        if wanted is None:
            return
        try:
            self._session = prune(self.model, wanted).attach()
        except (ConfigError, AdapterError) as error:
            while len(self._refusals) >= _MOST_REFUSALS:
                del self._refusals[next(iter(self._refusals))]
            self._refusals[config.to_json()] = str(error)
            raise _refusal(str(error)) from error
        masked = sum(plan.backend == "masked" for plan in self._session.plans)
        pruned = sum(plan.backend != "dense" for plan in self._session.plans)
        self.metrics.set("pop_mm_masked_parts", masked)
        self.metrics.set("pop_mm_pruned_parts", pruned)

    def close(self) -> None:
        """Leave the session: the model is bit for bit what it was."""
        session, self._session = self._session, None
        if session is not None:
            session.detach()
        for name in ("pop_mm_masked_parts", "pop_mm_pruned_parts"):
            self.metrics.set(name, 0)

    def said(self) -> dict[str, Any]:
        """What an answer says of itself beside its tokens: method, budget or ratio, and the share that was read."""
        if self._session is None:
            return {"method": "dense", "budget": 1.0, "ratio": None, "kept_share": 1.0}
        config = self._session.config
        sizes = self._session.report.bytes_per_token
        dense, kept = sizes["dense"], sizes["kept"]
        share = None if kept is None or not dense else kept / dense
        return {"method": config.chosen_method, "budget": config.budget, "ratio": config.ratio, "kept_share": share}

    def count(self, prompt: int, answer: int, seconds: float, said: Mapping[str, Any]) -> None:
        """Count an answer."""
        self.metrics.add("pop_mm_prompt_tokens_total", prompt)
        self.metrics.add("pop_mm_completion_tokens_total", answer)
        self.metrics.add("pop_mm_generation_seconds_total", seconds)
        if (share := said["kept_share"]) is not None:
            self.metrics.add("pop_mm_kept_share_sum", share)
            self.metrics.add("pop_mm_kept_share_count")


def is_dense(config: PopConfig) -> bool:
    """Whether settings leave nothing out."""
    whole = config.budget == 1 or (config.ratio == 0 and not config.layer_ratios)
    return whole and getattr(config.chosen, "head_budget", None) in (None, 1)


def _refusal(said: str) -> RequestError:
    return RequestError(400, said, "invalid_settings", "budget")


class Generation(Job):
    """One answer.

    Parameters
    ----------
    served : ServedModel
    config : PopConfig
    seed : int
        Of torch's random numbers, so that what was sampled before does not matter.
    inputs : mapping
        The prompt, for ``generate``: ``input_ids [1, tokens]`` and what else belongs to it.
    settings : mapping
        Other arguments of ``generate``.
    stops : sequence of str
        Texts with which the answer ends.

    Attributes
    ----------
    done : Future
        The ids of the answer, ``[tokens]``; of what there was until then if it was stopped.
    said : dict
        :meth:`ServedModel.said`, once it is done.
    """

    def __init__(
        self,
        served: ServedModel,
        config: PopConfig,
        seed: int,
        inputs: Mapping[str, Any],
        settings: Mapping[str, Any],
        stops: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self._served, self._config, self._seed = served, config, seed
        self._inputs, self._settings, self._stops = inputs, settings, stops
        self._looked_at = 4 + 4 * max(map(len, stops), default=0)  # tokens: a character may take four
        self.said: dict[str, Any] = {}
        self.done: Future[Tensor] = Future()
        self.done.set_running_or_notify_cancel()

    def run(self) -> None:
        """Generate, in the line's thread."""
        served, started = self._served, time.perf_counter()
        served.use(self._config)
        self.ready.set_result(None)
        try:
            torch.manual_seed(self._seed)
            criteria = StoppingCriteriaList([self._stopped])
            sequences = served.model.generate(**self._inputs, **self._settings, stopping_criteria=criteria)
            ids = sequences[0, self._inputs["input_ids"].shape[1] :]
            self.said = served.said()
            if self.stop.is_set():
                served.metrics.add("pop_mm_cancelled_total")
        except BaseException:
            served.close()  # the next request finds a model that is whole
            raise
        served.count(self._inputs["input_ids"].shape[1], len(ids), time.perf_counter() - started, self.said)
        if self.error is None:
            self.done.set_result(ids)
        else:
            self.done.set_exception(self.error)

    def fail(self, error: BaseException) -> None:
        """It was cancelled before its turn, or ``run`` raised."""
        super().fail(error)
        if self.stop.is_set():
            self._served.metrics.add("pop_mm_cancelled_total")
        if not self.done.done():
            self.done.set_exception(self.error)

    def _stopped(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        ends = self.stop.is_set()
        if self._stops and not ends:
            start = max(self._inputs["input_ids"].shape[1], input_ids.shape[1] - self._looked_at)
            text = self._served.tokenizer.decode(input_ids[0, start:], skip_special_tokens=True)
            ends = any(stop in text for stop in self._stops)
        return torch.full((len(input_ids),), ends, device=input_ids.device)


__all__ = ["Generation", "ServedModel", "is_dense"]
