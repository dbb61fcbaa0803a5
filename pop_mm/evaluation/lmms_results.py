"""An lmms-eval result of a pruned model carries the dense model's beside it: every evaluation runs twice."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .beside import add_dense, same_requests
from .lmms_model import PopVLM

_VARIANTS = (  # of a metric's name; lmms-eval's table puts them into columns of the metric's row
    *("stderr", "stderr_clt", "stderr_clustered"),
    *("expected_accuracy", "consensus_accuracy", "internal_variance", "consistency_rate"),
)


def beside_dense(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """``lmms_eval.evaluator.evaluate`` that, given a pruned :class:`PopVLM`, first evaluates the dense model.

    Its metrics stand beside the pruned ones, under ``"exact_match (dense),none"`` and so on, in lmms-eval's table and JSON;
    its answers stand in the samples as ``"filtered_resps (dense)"``. What was counted is under ``"pop"``, and each task
    has its ``"pruned_share,none"``. Other models are evaluated as before.
    """
    signature = inspect.signature(evaluate)

    @functools.wraps(evaluate)
    def evaluate_twice(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        lm = given["lm"]
        if not isinstance(lm, PopVLM):
            return evaluate(**given)
        lm.tallies.clear()
        with _pairs_stay_pairs():
            if not lm.prunes:
                return evaluate(**given)
            # Dense first: files that metrics write are then the pruned model's in the end.
            with lm.dense(), torch.random.fork_rng():  # both draw the same numbers, should a task sample
                dense = evaluate(**{**given, "response_cache": None})
            with _requests_again(given["task_dict"]):
                pruned = evaluate(**given)
        if pruned is not None:  # on the other processes of a distributed run it is
            _merge(pruned, dense, lm)
        return pruned

    evaluate_twice.__wrapped_by_pop_mm__ = True  # type: ignore[attr-defined]
    return evaluate_twice


def wrap_evaluator() -> None:
    """Put :func:`beside_dense` around lmms-eval's evaluator, once.

    Not at import: lmms-eval reads entry points while its evaluator is being imported.
    """
    from lmms_eval import evaluator

    if not hasattr(evaluator.evaluate, "__wrapped_by_pop_mm__"):
        evaluator.evaluate = beside_dense(evaluator.evaluate)


@contextmanager
def _pairs_stay_pairs() -> Iterator[None]:
    """Within: losses reach the metrics. lmms-eval 0.7 makes text of everything that is no answer, ``(1.5, True)`` too."""
    from lmms_eval import evaluator

    unwrap = evaluator.unwrap_generation_output

    def keep(output: Any) -> Any:
        pair = isinstance(output, tuple | list) and len(output) == 2 and isinstance(output[0], float)
        return (tuple(output), None) if pair else unwrap(output)

    evaluator.unwrap_generation_output = keep
    try:
        yield
    finally:
        evaluator.unwrap_generation_output = unwrap


def _merge(pruned: dict[str, Any], dense: dict[str, Any], lm: PopVLM) -> None:
    add_dense(pruned, dense, _VARIANTS)
    for name, tally in lm.tallies.items():
        generated, scored = tally.pruned_generated_share, tally.pruned_token_share
        if name in pruned["results"]:
            pruned["results"][name]["pruned_share,none"] = scored if generated is None else generated
    for task, samples in pruned.get("samples", {}).items():
        for sample, other in zip(samples, dense["samples"][task], strict=True):
            sample["filtered_resps (dense)"] = other["filtered_resps"]
    pruned["pop"] = lm.pop_info()


@contextmanager
def _requests_again(task_dict: Mapping[Any, Any]) -> Iterator[None]:
    """Within: the tasks have the requests that they built already, unanswered."""
    tasks = list(_tasks(task_dict))
    for task in tasks:
        for request in task.instances:
            request.resps, request.token_counts = [], []
            request.filtered_resps, request.raw_filtered_resps = {}, {}
    with same_requests(tasks):
        yield


def _tasks(task_dict: Mapping[Any, Any]) -> Iterator[Any]:
    """Every task, in a flat or a nested dictionary."""
    for value in task_dict.values():
        found = value[1] if isinstance(value, tuple) else value
        if isinstance(found, Mapping):
            yield from _tasks(found)
        elif found is not None:
            yield found
