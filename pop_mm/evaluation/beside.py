"""What both harness plug-ins need to show the dense model's figures beside the pruned one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def dense_key(key: str, variants: Sequence[str] = ("stderr",)) -> str:
    """``"acc (dense)_stderr,none"`` for ``"acc_stderr,none"``: the table puts variants of a metric into its row."""
    metric, comma, name = key.partition(",")
    variant = next((f"_{variant}" for variant in variants if metric.endswith(f"_{variant}")), "")
    return f"{metric.removesuffix(variant)} (dense){variant}{comma}{name}"


def add_dense(pruned: Mapping[str, Any], dense: Mapping[str, Any], variants: Sequence[str] = ("stderr",)) -> None:
    """Put the metrics of one result into the other: those of tasks and groups, and which way each is better."""
    for table in ("results", "groups"):
        for name, metrics in pruned.get(table, {}).items():
            found = dense[table][name].items()
            metrics.update({dense_key(key, variants): value for key, value in found if "," in key})
    better = pruned.get("higher_is_better", {})
    for name, metrics in better.items():
        better[name] = {**metrics, **{dense_key(metric): value for metric, value in metrics.items()}}


@contextmanager
def same_requests(tasks: Iterable[Any]) -> Iterator[None]:
    """Within: tasks ask what they asked already; building requests again would draw other few-shot examples."""
    tasks = list(tasks)
    for task in tasks:
        task.build_all_requests = lambda **_: None
    try:
        yield
    finally:
        for task in tasks:
            del task.build_all_requests
