"""Libraries that a wheel ships, compiled for several processors; which of them run here.

A file's name holds the digest of its sources. A library of other sources is never taken for that of these.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

from . import compiler
from .sources import Sources

FOLDER = Path(__file__).with_name("libraries")  # empty but in a platform wheel
_STRIP = "-s"  # no symbols but those that are loaded


@dataclass(frozen=True)
class Variant:
    """A kind of processor.

    Attributes
    ----------
    name : str
        Of the folder in :data:`FOLDER`; as that of a module, like the names of the files.
    needs : frozenset of str
        Flags of ``/proc/cpuinfo`` that the processor must have.
    options : tuple of str
        For the compiler.
    """

    name: str
    needs: frozenset[str]
    options: tuple[str, ...]


_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
# Best first. The levels are those of the x86-64 psABI; the last variant runs on any processor of the kind.
VARIANTS = {
    "x86_64": (
        Variant("x86_64_v4", _V4, ("-march=x86-64-v4",)),
        Variant("x86_64_v3", _V3, ("-march=x86-64-v3",)),
        Variant("x86_64", frozenset(), ("-march=x86-64",)),
    ),
    "aarch64": (Variant("aarch64", frozenset(), ("-march=armv8-a",)),),
}


def path(sources: Sources, variant: Variant) -> Path:
    """Where the library of these sources lies for a variant, whether or not it is there."""
    return FOLDER / variant.name / f"{sources.name}_{sources.digest()}.so"


def build(sources: Sources, variant: Variant, folder: Path) -> Path:
    """Compile the library of some sources for a variant, as releases do, into a folder laid out as :data:`FOLDER`; the file.

    Raises
    ------
    RuntimeError
        It cannot be compiled.
    """
    target = folder / path(sources, variant).relative_to(FOLDER)
    target.parent.mkdir(parents=True, exist_ok=True)
    reason = compiler.build(sources.files, target, (*sources.options, _STRIP), variant.options)
    if reason is not None:
        raise RuntimeError(f"{target.name} for {variant.name}: {reason}")
    return target


def load(sources: Sources) -> ctypes.CDLL | str | None:
    """The best shipped library that runs here, why it cannot be loaded, or None if none was shipped."""
    if not FOLDER.exists():
        return None
    flags = processor_flags()
    for variant in VARIANTS.get(platform.machine(), ()):
        if variant.needs <= flags and (found := path(sources, variant)).exists():
            try:
                return ctypes.CDLL(str(found))
            except OSError as error:
                return f"the shipped library cannot be loaded ({error})"
    return None


def processor_flags() -> frozenset[str]:
    """The processor's flags that the system lets programs use; empty where Linux does not say so."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    listed = [line.partition(":")[2].split() for line in lines if line.split(":")[0].strip() == "flags"]
    return frozenset.intersection(*map(frozenset, listed)) if listed else frozenset()
