"""The error of a benchmark that cannot be run."""

from ..errors import PopError


class BenchError(PopError):
    """A benchmark asks for something that cannot be built or measured."""
