"""What a linear module computes where its weight does not say it: adapters, packed, offloaded and parametrised weights.

The module is asked: blocks of unit vectors go in, the columns of its matrix come out. Nothing about the module is taken for
granted but that it can be called, and that what it computes is linear up to a constant.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import AdapterError, one_line

_ROWS = 256  # unit vectors in one call
_PATIENCE = 3.0  # seconds without a progress bar
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_local = threading.local()
Item = TypeVar("Item")


def asking() -> bool:
    """Whether this thread is asking a module, so that its input is no activation of the model."""
    return getattr(_local, "asking", False)


def is_wide_float(dtype: torch.dtype) -> bool:
    """Whether a dtype can be computed with: a float of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def same_class(kind: type, known: type | str) -> bool:
    """Whether a class is this one; ``"module:Class"`` names one that need not have been imported, found by identity."""
    if isinstance(known, str):
        module, _, name = known.partition(":")
        return getattr(sys.modules.get(module), name, None) is kind
    return kind is known


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings a module's own weights when it runs."""
    hook = getattr(module, "_hf_hook", None)
    return hook is not None and any(tensor.device.type == "meta" for tensor in module.parameters(recurse=False))


def has_unloaded_weights(model: nn.Module) -> bool:
    """Whether a weight is on the meta device and nothing (accelerate) will bring it."""
    if hasattr(model, "hf_device_map"):
        return False
    return _unloaded(model)


def _unloaded(module: nn.Module) -> bool:
    own = any(p.device.type == "meta" for p in module.parameters(recurse=False))
    return not hasattr(module, "_hf_hook") and (own or any(_unloaded(child) for child in module.children()))


def loaded(module: nn.Module) -> AbstractContextManager[object]:
    """Within: a module's own offloaded weights are where they are computed with."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def runs_own_forward(module: nn.Module) -> bool:
    """Whether a call computes what the class says: only accelerate's moving of weights, or a session, replaced its forward."""
    if "forward" not in module.__dict__:
        return True
    if _is_ours(module.__dict__["forward"]):
        return True
    hook, forward = getattr(module, "_hf_hook", None), getattr(module, "_old_forward", None)
    moves = hook is not None and same_class(type(hook), "accelerate.hooks:AlignDevicesHook")
    return moves and getattr(forward, "__func__", None) is type(module).forward


def _is_ours(forward: object) -> bool:
    """Whether a function was defined in this package."""
    return str(getattr(forward, "__module__", "")).partition(".")[0] == __package__


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes. Offloaded: accelerate's execution device. Without weights of its own: a CPU."""
    for part in module.modules():
        if is_offloaded(part):
            device = getattr(part._hf_hook, "execution_device", None)
            return torch.device("cpu") if device is None else torch.device(device)
    tensors = (t for part in module.modules() for t in (*part._parameters.values(), *part._buffers.values()))
    found = [tensor.device for tensor in tensors if tensor is not None]
    if not found and isinstance(weight := getattr(module, "weight", None), Tensor):
        found = [weight.device]
    return found[0] if found else torch.device("cpu")


def activation_dtype(layer: nn.Module) -> torch.dtype | None:
    """Dtype of the activations in a decoder layer: that of its norms and biases, which nobody packs; None if there are none."""
    found = [p for p in layer.parameters() if is_wide_float(p.dtype)]
    return next((p.dtype for p in sorted(found, key=lambda p: p.dim() != 1)), None)


@torch.no_grad()
def columns(name: str, module: nn.Module, size: int, dtype: torch.dtype | None, wide: torch.dtype) -> Iterator[Tensor]:
    """The columns of the matrix that a module multiplies with, ``[n, out]`` in ``wide`` at a time.

    Parameters
    ----------
    name : str
        Of the module, for errors.
    size : int
        Inputs of the module.
    dtype : torch.dtype or None
        Of the model's activations; if the module does not take that, others are tried.

    Raises
    ------
    AdapterError
        The module takes no unit vectors.
    """
    device = device_of(module)
    own = (p.dtype for p in (*module.parameters(), *module.buffers()) if is_wide_float(p.dtype))
    dtypes = list(dict.fromkeys([*([dtype] if dtype else []), *own, *_FLOATS]))
    for start in range(0, size, _ROWS):
        count = min(_ROWS, size - start)
        vectors = torch.zeros(count + 1, size, dtype=torch.float32, device=device)
        vectors[:count, start : start + count].fill_diagonal_(1)  # the last one stays zero: it gives the constant
        answers = _answers(name, module, vectors, dtypes)
        if answers.dim() != 2 or len(answers) != count + 1:
            raise AdapterError(f"{name} gave {tuple(answers.shape)} for {count + 1} vectors; it is no linear module.")
        answers = answers.to(wide)
        yield answers[:count] - answers[count]


def _answers(name: str, module: nn.Module, vectors: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """``[n, out]``; leaves in ``dtypes`` the one that the module takes."""
    refused = None
    for dtype in dtypes:
        try:
            with _asked(module):
                answers = module(vectors.to(dtype).unsqueeze(0))
        except Exception as error:  # whatever the package says to a dtype that it does not take
            refused = refused or error
            continue
        dtypes[:] = [dtype]
        answers = answers[0] if isinstance(answers, tuple) else answers
        return answers.flatten(0, -2)
    assert refused is not None
    raise AdapterError(
        f"{name}, a {type(module).__name__}, does not tell its weights: asked for its columns it said "
        f"{one_line(refused)!r}. Load the model without quantisation, merge its adapters, or use scorer='activation', "
        "which needs no weights."
    ) from refused


@contextmanager
def _asked(module: nn.Module) -> Iterator[None]:
    """Within: the module is in eval mode (dropout of an adapter that was added later), and sessions look away."""
    training = [part for part in module.modules() if part.training]
    _local.asking = True
    try:
        for part in training:
            part.training = False
        yield
    finally:
        _local.asking = False
        for part in training:
            part.training = True


def with_progress(items: Iterable[Item], count: int, what: str) -> Iterator[Item]:
    """The items; a progress bar shows on a terminal once they take more than a few seconds."""
    bar, task, started = None, None, time.perf_counter()
    try:
        for done, item in enumerate(items):
            if bar is None and time.perf_counter() - started > _PATIENCE and sys.stderr.isatty():
                from rich.console import Console
                from rich.progress import Progress

                bar = Progress(console=Console(stderr=True), transient=True)
                bar.start()
                task = bar.add_task(what, total=count)
            if bar is not None and task is not None:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()
