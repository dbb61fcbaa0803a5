"""lmms-eval with POP: ``python -m pop_mm.evaluation.lmms_harness --model pop --model_args ...`` (docs/harness_vision.md).

The entry point of the group ``lmms_eval.models`` makes the model ``pop`` known to lmms-eval's own command too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ..errors import PopError

_MISSING = (
    'This needs lmms-eval; {}. Run `pip install "pop_mm[lmms-eval]"`; its torchvision must be of the same build as torch '
    "(CPU or the same CUDA)."
)


class HarnessMissingError(PopError, ImportError):
    """lmms-eval is not installed, or a package that it needs is not."""


try:
    from .lmms_model import PopVLM, PopVLMSimple
    from .lmms_results import beside_dense
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] == "pop_mm":
        raise
    if __name__ == "__main__":
        raise SystemExit(_MISSING.format(error)) from None
    raise HarnessMissingError(_MISSING.format(error)) from error


def manifest() -> Any:
    """What the entry point gives lmms-eval: the model ``pop``, for both of its kinds of tasks."""
    from lmms_eval.models.registry_v2 import (
        ModelManifest,
    )  # not above: it reads the entry points, so it needs this module

    home = "pop_mm.evaluation.lmms_harness"
    return ModelManifest("pop", simple_class_path=f"{home}.PopVLMSimple", chat_class_path=f"{home}.PopVLM")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run lmms-eval's own command, with the model ``pop`` whether the entry point is installed or not."""
    from lmms_eval.cli import dispatch
    from lmms_eval.models import MODEL_REGISTRY_V2

    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    before, sys.argv = sys.argv, ["lmms-eval", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        dispatch.main()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()

__all__ = ["HarnessMissingError", "PopVLM", "PopVLMSimple", "beside_dense", "main", "manifest"]
