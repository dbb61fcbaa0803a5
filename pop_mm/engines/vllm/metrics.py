"""What ``/metrics`` says of pop_mm: by vLLM's entry point ``vllm.stat_logger_plugins``, in its API server."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import StatLoggerBase

from .planned import plan_inputs
from .settings import settings_of

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


class PopStatLogger(StatLoggerBase):  # type: ignore[misc]
    """Counts the tokens of an engine with pop_mm's settings, and says how many FFNs it prunes; else does nothing."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._tokens: Any = None
        config = settings_of(vllm_config)
        if config is None:
            return
        planned = plan_inputs(copy.deepcopy(vllm_config.model_config.hf_config), config)
        name = vllm_config.model_config.served_model_name
        labels = (name, str(engine_index), config.chosen_method, config.label)
        ffns, pruned, tokens = (metric.labels(*labels) for metric in _metrics())
        ffns.set(len(planned.ffns))
        pruned.set(planned.pruned_ffns)
        self._tokens = tokens if planned.inputs else None

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Count a step's tokens."""
        if self._tokens is not None and iteration_stats is not None:
            self._tokens.inc(iteration_stats.num_generation_tokens)

    def log_engine_initialized(self) -> None:
        """Nothing: the worker's log says what was taken over."""


__all__ = ["PopStatLogger"]
