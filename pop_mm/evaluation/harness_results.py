"""A harness result of a pruned model carries the dense model's beside it: every evaluation runs twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.task import Task

from .beside import add_dense, same_requests
from .harness_model import PopLM


def beside_dense(evaluate: Callable[..., Any]) -> Callable[..., Any]:
    """``lm_eval.evaluator.evaluate`` that, given a :class:`PopLM`, also evaluates the dense model on the same requests.

    Its metrics stand beside the pruned ones, under ``"acc (dense),none"`` and so on, so that lm_eval's table and JSON
    show both. Samples are the pruned model's. Other models are evaluated as before.
    """

    @functools.wraps(evaluate)
    def evaluate_twice(lm: Any, task_dict: Mapping[str, Any], **settings: Any) -> Any:
        if not isinstance(lm, PopLM):
            return evaluate(lm=lm, task_dict=task_dict, **settings)
        lm.tallies.clear()
        with torch.random.fork_rng():  # both draw the same numbers, should a task sample
            pruned = evaluate(lm=lm, task_dict=task_dict, **settings)
        with lm.dense(), _requests_again(task_dict):
            dense = evaluate(lm=lm, task_dict=task_dict, **{**settings, "write_out": False})
        if pruned is not None:  # on the other processes of a distributed run it is
            add_dense(pruned, dense)
            pruned["config"] = {"pop": lm.pop_info()}
        return pruned

    return evaluate_twice


@contextmanager
def _requests_again(task_dict: Mapping[str, Any]) -> Iterator[None]:
    """Within: the tasks have the requests that they built already, unanswered; afterwards the answers are back."""
    tasks = list(_tasks(task_dict))
    requests = [request for task in tasks for request in task.instances]
    before = [(request.resps, request.filtered_resps) for request in requests]
    for request in requests:
        request.resps, request.filtered_resps = [], {}
    try:
        with same_requests(tasks):
            yield
    finally:
        for request, (resps, filtered) in zip(requests, before, strict=True):
            request.resps, request.filtered_resps = resps, filtered


def _tasks(task_dict: Mapping[str, Any]) -> Iterator[Any]:
    """Every task, in a flat or a nested dictionary."""
    for value in task_dict.values():
        if isinstance(value, Task):
            yield value
        elif isinstance(value, Mapping):
            yield from _tasks(value)
