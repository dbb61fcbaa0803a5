"""Repetition and loops in generated text, counted where the answer is known."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import generated_text

    return generated_text


def test_repeated_grams(module):
    assert module.repeated_grams([1, 2, 3]) == 0
    assert module.repeated_grams(list(range(20))) == 0
    assert module.repeated_grams([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)
    assert module.repeated_grams([7] * 13) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        (list(range(30)), None),
        ([1, 2, 1, 2], None),
        ([1, 2, 1, 2, 1, 2], 2),
        ([8, 9, 5, 5, 5, 6], 3),
        ([0, *range(10, 50), *range(10, 50), *range(10, 50)], 41),
        ([0, *range(10, 51), *range(10, 51), *range(10, 51)], None),  # longer than what counts
        ([1, 2, 3, 1, 2, 4, 1, 2, 3], None),
    ],
)
def test_first_loop(module, tokens, loop):
    assert module.first_loop(tokens) == loop
