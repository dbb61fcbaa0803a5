"""Where pop_mm keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder: ``$POP_MM_CACHE``, else ``$XDG_CACHE_HOME/pop_mm``, else ``~/.cache/pop_mm``.

    Raises
    ------
    RuntimeError
        The home directory is needed and cannot be found.
    """
    own = os.environ.get("POP_MM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "pop_mm")
    return Path(own).expanduser()
