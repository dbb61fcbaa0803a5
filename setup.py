"""Tags the wheel for a platform where compiled libraries are in it (``make dist``); everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel

COMPILED = any(Path(__file__).parent.glob("pop_mm/native/libraries/*/*.so"))


class Compiled(Distribution):
    """pop_mm, which is pure Python but for those libraries."""

    def has_ext_modules(self) -> bool:
        """Whether the wheel is of a platform."""
        return COMPILED


class Wheel(bdist_wheel):
    """The libraries are loaded by ctypes: any Python 3 of the platform takes them."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return ("py3", "none", super().get_tag()[2])


setup(distclass=Compiled, cmdclass={"bdist_wheel": Wheel})
