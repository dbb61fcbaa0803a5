"""What ``/metrics`` and the log say of pop_mm: by vLLM's entry point ``vllm.stat_logger_plugins``, in its API server."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.logger import init_logger
from vllm.v1.metrics.loggers import StatLoggerBase

from .carried import counts_in
from .counts import Counts
from .planned import plan_inputs
from .settings import settings_of

logger = init_logger("vllm.pop_mm")

_LABELS = ("model_name", "engine", "method", "settings")


@cache
def _metrics() -> tuple[Gauge, Gauge, Counter]:
    """Made once in a process: prometheus knows no second one of the same name."""
    return (
        Gauge("pop_mm:ffns", "FFNs of the model.", _LABELS, multiprocess_mode="mostrecent"),
        Gauge(
            "pop_mm:pruned_ffns",
            "FFNs of which decode steps leave something out.",
            _LABELS,
            multiprocess_mode="mostrecent",
        ),
        Counter("pop_mm:generation_tokens", "Tokens generated with something left out.", _LABELS),
    )


@cache
def _weight_bytes() -> tuple[Counter, Counter]:
    """As :func:`_metrics`; with labels from the first counts on, so that an engine that sends none shows no zeros."""
    return (
        Counter(
            "pop_mm:decode_weight_bytes_kept",
            "Bytes of weights that decode tokens kept, of the modules whose inputs pop_mm prunes; every token counts for itself. "
            "Divided by pop_mm:decode_weight_bytes_total it is the share that was kept.",
            _LABELS,
        ),
        Counter(
            "pop_mm:decode_weight_bytes",
            "Bytes of all weights of the modules whose inputs pop_mm prunes, once for every decode token.",
            _LABELS,
        ),
    )


class PopStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Counts what an engine with pop_mm's settings generates and keeps, and how many FFNs it prunes; else does nothing."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._tokens: Any = None
        self._since = Counts(0, 0, 0)  # the last line
        config = settings_of(vllm_config)
        if config is None:
            return
        planned = plan_inputs(copy.deepcopy(vllm_config.model_config.hf_config), config)
        name = vllm_config.model_config.served_model_name
        self._labels = (name, str(engine_index), config.chosen_method, config.label)
        ffns, pruned, tokens = (metric.labels(*self._labels) for metric in _metrics())
        ffns.set(len(planned.ffns))
        pruned.set(planned.pruned_ffns)
        self._tokens = tokens if planned.inputs else None

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Count a step's tokens, and what its worker has sent along."""
        if self._tokens is None:
            return
        if iteration_stats is not None:
            self._tokens.inc(iteration_stats.num_generation_tokens)
        if (counts := counts_in(scheduler_stats)) is not None:
            self._since = Counts(*map(sum, zip(self._since, counts, strict=True)))
            for metric, value in zip(_weight_bytes(), (counts.kept, counts.all), strict=True):
                metric.labels(*self._labels).inc(value)

    def log(self) -> None:
        """Say what was kept since the last line, if anything was decoded; vLLM asks for it at its interval."""
        since, self._since = self._since, Counts(0, 0, 0)
        if since.tokens:
            logger.info(
                "pop_mm: %d decode tokens since the last line kept %.1f%% of the pruned modules' weights",
                since.tokens,
                100 * since.kept / since.all,
            )

    def log_engine_initialized(self) -> None:
        """Nothing: the worker's log says what was taken over."""


__all__ = ["PopStatLogger"]
