"""lm-evaluation-harness with POP: ``python -m pop_mm.evaluation.lm_harness run --model pop --model_args ...``.

Importing this module registers the model ``pop`` and makes every evaluation of it dense as well (docs/harness.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import PopError

_MISSING = 'This needs lm-evaluation-harness, which is not installed: pip install "pop_mm[eval]".'


class HarnessMissingError(PopError, ImportError):
    """lm-evaluation-harness is not installed."""


try:
    import lm_eval.evaluator

    from .harness_model import PopLM
    from .harness_results import beside_dense
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "lm_eval":
        raise
    if __name__ == "__main__":
        raise SystemExit(_MISSING) from None
    raise HarnessMissingError(_MISSING) from None


def tasks_folder() -> Path:
    """The folder of the tasks that come with pop_mm, for ``--include_path`` and ``TaskManager(include_path=...)``."""
    return Path(__file__).parents[1] / "data" / "tasks"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lm_eval's own command, with the model ``pop`` and our tasks unless another ``--include_path`` is given."""
    from lm_eval.__main__ import cli_evaluate

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and not any(argument.startswith("--include_path") for argument in arguments):
        arguments = [*arguments, "--include_path", str(tasks_folder())]
    before, sys.argv = sys.argv, ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if not hasattr(lm_eval.evaluator.evaluate, "__wrapped_by_pop_mm__"):
    lm_eval.evaluator.evaluate = beside_dense(lm_eval.evaluator.evaluate)
    lm_eval.evaluator.evaluate.__wrapped_by_pop_mm__ = True

if __name__ == "__main__":
    main()

__all__ = ["HarnessMissingError", "PopLM", "beside_dense", "main", "tasks_folder"]
