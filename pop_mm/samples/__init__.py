"""Small real models and texts to try pop_mm on."""

from ..errors import SampleError
from .fetching import SAMPLES, HubError, Sample, fetch, load, load_config, load_vision, resolve, takes_images
from .passages import load_passages

__all__ = [
    "SAMPLES",
    "HubError",
    "Sample",
    "SampleError",
    "fetch",
    "load",
    "load_config",
    "load_passages",
    "load_vision",
    "resolve",
    "takes_images",
]
