"""The machine's own C compiler: a library is made for this very processor, and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..folders import cache_folder
from .sources import FLAGS, Sources

NATIVE = ("-march=native", "-mtune=generic")  # tuned as shipped libraries are, whose sums are rounded alike then


def load(sources: Sources) -> ctypes.CDLL | str:
    """The library of some sources, from the cache folder if it has been made before; or why there is none."""
    compiler = command()
    if not compiler:
        return "none was found"
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
        key = hashlib.sha256("\n".join((sources.text(), version, _processor())).encode()).hexdigest()[:16]
        path = cache_folder() / "kernels" / f"kernels-{key}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                made = Path(folder, path.name)
                if (reason := build(sources.files, made, sources.options)) is not None:
                    return reason
                made.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, UnicodeError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"


def build(
    files: Sequence[Path], target: Path, options: Sequence[str] = (), processor: Sequence[str] = NATIVE
) -> str | None:
    """Compile C into a shared library; why that failed, or None if it did not.

    Parameters
    ----------
    files : sequence of Path
    target : Path
        The library.
    options, processor : sequence of str
        For the compiler; ``processor`` says which one the code is for, by default this machine's.
    """
    compiler = command()
    line = [*compiler, *FLAGS, *processor, *options, "-o", str(target), *map(str, files), "-lm"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    if not done.returncode:
        return None
    return f"{' '.join(compiler)} failed: {(done.stderr.strip() or 'no message').splitlines()[0]}"


def command() -> list[str]:
    """The command of the C compiler; empty if there is none."""
    named = os.environ.get("CC", "").split()  # it may hold options, or begin with ccache
    return named if named and shutil.which(named[0]) else [c for c in ("gcc", "cc") if shutil.which(c)][:1]


def _processor() -> str:
    """What the code is compiled for: a cache folder may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return f"{platform.machine()} {platform.processor()}"
    lines = info.read_text().split("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features"))
