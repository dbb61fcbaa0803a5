"""What one shared library is made of."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC")  # of every library


@dataclass(frozen=True)
class Sources:
    """C files that become one library.

    Attributes
    ----------
    name : str
        Of the library; it is part of file names.
    files, headers : tuple of Path
        Headers are not compiled by themselves, but change the result.
    options : tuple of str
        For the compiler, behind :data:`FLAGS`.
    """

    name: str
    files: tuple[Path, ...]
    headers: tuple[Path, ...]
    options: tuple[str, ...] = ()

    def text(self) -> str:
        """All that decides what the library does, apart from compiler and processor."""
        texts = [path.read_text(encoding="utf-8") for path in (*self.files, *self.headers)]
        return "\n".join([*texts, " ".join((*FLAGS, *self.options))])

    def digest(self) -> str:
        """A short digest of :meth:`text`: other sources have another one."""
        return hashlib.sha256(self.text().encode()).hexdigest()[:16]
