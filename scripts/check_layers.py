"""import-linter for pop_mm and its adapters: the folder ``adapters`` is the package ``pop_mm.adapters``.

``python scripts/check_layers.py`` checks the contracts of pyproject.toml on a copy in which the adapters lie in their package.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Check the contracts; the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder, "pop_mm")
        leave = shutil.ignore_patterns("adapters", "libraries", "__pycache__")
        shutil.copytree(ROOT / "pop_mm", package, ignore=leave)
        shutil.copytree(ROOT / "adapters", package / "adapters", ignore=leave)
        os.chdir(folder)  # import-linter looks for packages in the working directory first
        try:
            return lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
        finally:
            os.chdir(ROOT)


if __name__ == "__main__":
    sys.exit(main())
