"""mypy for pop_mm and its adapters: the folder ``adapters`` is the package ``pop_mm.adapters``, which mypy cannot be told.

``python scripts/check_types.py [OPTIONS OF MYPY]``
"""

from __future__ import annotations

import sys

from mypy import build
from mypy.errors import CompileError
from mypy.main import process_options
from mypy.modulefinder import BuildSource


def main(arguments: list[str]) -> int:
    """Check what pyproject.toml lists, and print what is wrong; the exit code."""
    found, options = process_options(arguments)
    options.fast_module_lookup = True  # imports are looked up among the sources first
    sources = {}
    for source in found:
        module = source.module
        if module.split(".")[0] == "adapters":
            module = f"pop_mm.{module}"
        sources[module] = BuildSource(source.path, module, base_dir=source.base_dir)
    try:
        messages = build.build(list(sources.values()), options).errors
    except CompileError as error:
        messages = error.messages
    print("\n".join(messages or [f"mypy: no errors in {len(sources)} files"]))
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
