"""How a worker's counts reach the process that serves ``/metrics``: on what vLLM sends there after each step anyway.

The worker sends a ``ModelRunnerOutput`` to the engine's core, whole, so the counts are one more attribute of it. The core sends
``SchedulerStats`` to one API server, and of these only vLLM's own fields. One of them is a dict of numbers that nothing reads
without LoRA, which :func:`.settings.check_engine` refuses: the counts go in there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from .counts import Counts

_ATTRIBUTE = "pop_mm_counts"
_PREFIX = "pop_mm:"


def install() -> None:
    """Let the scheduler put a step's counts, where there are any, into its statistics."""
    update = Scheduler.update_from_output
    SchedulerStats().running_lora_adapters.clear()  # fails here, not at the first step, in a vLLM that has no such field

    def update_from_output(self: Scheduler, scheduler_output: Any, model_runner_output: Any) -> Any:
        found = update(self, scheduler_output, model_runner_output)
        counts = getattr(model_runner_output, _ATTRIBUTE, None)
        if counts is not None:
            _put(counts, found.values())
        return found

    Scheduler.update_from_output = update_from_output


def with_counts(output: Any, counts: Callable[[], Counts | None]) -> Any:
    """The output of a model runner's step, which brings along what ``counts`` answers; what has no tokens is as it was."""
    if output is EMPTY_MODEL_RUNNER_OUTPUT or not isinstance(output, ModelRunnerOutput | AsyncModelRunnerOutput):
        return output  # the empty one is shared by all steps
    if (found := counts()) is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):  # vLLM asks it for the other later, in a thread of its own
        get_output = output.get_output
        output.get_output = lambda: _marked(get_output(), found)
        return output
    return _marked(output, found)


def _marked(output: Any, counts: Counts) -> Any:
    setattr(output, _ATTRIBUTE, counts)
    return output


def _put(counts: Counts, outputs: Any) -> None:
    for each in outputs:
        if each.scheduler_stats is not None:  # of one of them, if vLLM keeps statistics
            for name, value in counts._asdict().items():
                each.scheduler_stats.running_lora_adapters[_PREFIX + name] = value


def counts_in(scheduler_stats: Any) -> Counts | None:
    """What a step's statistics bring along; None if nothing."""
    if scheduler_stats is None:
        return None
    found = scheduler_stats.running_lora_adapters
    names = [_PREFIX + name for name in Counts._fields]
    return Counts(*(found[name] for name in names)) if names[0] in found else None


__all__ = ["counts_in", "install", "with_counts"]
