"""Fewer cases where a full product of parameters proves nothing new: every pair of values, each at least once.

What goes wrong hangs on one value (an architecture, a dtype, a mode) or on two that meet (a fused layout in float16, an
executor in chunked prefill), hardly ever on three. ``covers(a=..., b=..., c=...)`` therefore parametrises a test by a
*pairwise covering design*: each value of each parameter occurs, and so does each pair of values of two parameters. Three
parameters of 6, 3 and 2 values need 18 rows instead of 36, four of 8, 4, 3 and 2 values some 32 instead of 192.

The rows are chosen greedily and depend on the values' places alone: the same cases on every machine and in every run. Where
three parameters together do matter, write the product of two as one parameter. The product of architectures, executors and
modes stays whole in ``test_inplace_selects_and_decodes_like_masked`` of ``test_invariants.py`` and ``test_moe_invariants.py``.
"""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest


def covering(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value of each axis in which every pair of values of two axes meets at least once.

    Parameters
    ----------
    *axes : iterable
        Values of each parameter; they need not be hashable.

    Returns
    -------
    list of tuple
        As many rows as the two longest axes have pairs, or a few more; in the order of the full product.
    """
    values = [list(axis) for axis in axes]
    columns = list(combinations(range(len(values)), 2))
    candidates = {
        row: {(a, b, row[a], row[b]) for a, b in columns} for row in product(*(range(len(axis)) for axis in values))
    }
    if not columns:
        return [(value,) for value in values[0]]
    missing = set().union(*candidates.values())
    chosen = []
    while missing:
        row = max(candidates, key=lambda row: len(candidates[row] & missing))  # of equals, the first
        missing -= candidates.pop(row)
        chosen.append(row)
    return [tuple(axis[place] for axis, place in zip(values, row, strict=True)) for row in sorted(chosen)]


def covers(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrise a test by the rows of :func:`covering`: ``@covers(dtype=DTYPES, threads=(1, 2, 3), gated=(True, False))``."""
    return pytest.mark.parametrize(list(axes), covering(*axes.values()))
