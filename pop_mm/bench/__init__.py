"""What pruning gains in speed: dense and pruned in turn, beside what bytes and the FFNs' share of the time allow."""

from .errors import BenchError
from .run import check, measure, steps
from .source import Source
from .variants import Setup

__all__ = ["BenchError", "Setup", "Source", "check", "measure", "steps"]
