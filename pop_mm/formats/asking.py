"""What a linear module computes where its weight does not say it: adapters, packed, offloaded and parametrised weights.

The module is asked: blocks of unit vectors go in, the columns of its matrix come out. Nothing about the module is taken for
granted but that it can be called, and that what it computes is linear up to a constant.
"""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..classes import is_a, is_own, same_class
from ..errors import AdapterError, one_line

_ROWS = 256  # unit vectors in one call
# relative, of a linear module: float32 on a CPU; TF32 elsewhere; activations that are quantised on the way
_TOLERANCE, _TF32_TOLERANCE, _PACKED_TOLERANCE = 1e-4, 0.005, 0.1
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
    if is_ours(module.__dict__["forward"]):
        return True
    hook, forward = getattr(module, "_hf_hook", None), getattr(module, "_old_forward", None)
    moves = hook is not None and same_class(type(hook), "accelerate.hooks:AlignDevicesHook")
    return moves and getattr(forward, "__func__", None) is type(module).forward


def is_ours(thing: object) -> bool:
    """Whether a function or class was defined in this package; what wraps a function is judged by itself."""
    function = thing.func if isinstance(thing, partial) else thing
    names = getattr(function, "__globals__", {"__name__": getattr(function, "__module__", "")})
    return is_own(str(names.get("__name__")))


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


def known_weight(module: nn.Module) -> Tensor | None:
    """The matrix of LoRA and of torchao's weights, as they would store it, where they tell it; None for everything else.

    It takes a second where asking takes a minute. Only :func:`multiplies_with` says whether it is right.
    """
    weight: Any = module._parameters.get("weight")
    if type(module) is nn.Linear and hasattr(weight, "dequantize") and type(weight) is not nn.Parameter:
        return weight.dequantize() if runs_own_forward(module) else None
    if not same_class(type(module), "peft.tuners.lora.layer:Linear") or not runs_own_forward(module):
        return None
    lora: Any = module
    base = lora.get_base_layer()
    weight = base._parameters.get("weight")
    if not same_class(type(base), nn.Linear) or not runs_own_forward(base) or type(weight) is not nn.Parameter:
        return None
    active = [] if lora.disable_adapters or lora.merged else [a for a in lora.active_adapters if a in lora.lora_A]
    if any(is_offloaded(part) for part in module.modules()) or any(a in lora.lora_variant for a in active):
        return None
    return sum((lora.get_delta_weight(adapter).to(weight.dtype) for adapter in active), weight.detach())


@torch.no_grad()
def multiplies_with(name: str, module: nn.Module, weight: Tensor, dtype: torch.dtype | None) -> bool:
    """Whether a module multiplies with a matrix ``[out, in]``, as far as random vectors can tell."""
    vectors = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.device)
    vectors[2] = 0  # for the constant
    dtypes = _dtypes(module, dtype)
    answers = _answers(name, module, vectors, dtypes).to(torch.float64)
    wanted = vectors[:2].to(torch.float64) @ weight.to(torch.float64).t()
    return bool((answers[:2] - answers[2] - wanted).norm() <= _tolerance(module, dtypes[0]) * wanted.norm())


def _dtypes(module: nn.Module, dtype: torch.dtype | None) -> list[torch.dtype]:
    """What a module may take, the likeliest first."""
    own = (p.dtype for p in (*module.parameters(), *module.buffers()) if is_wide_float(p.dtype))
    return list(dict.fromkeys([*([dtype] if dtype else []), *own, *_FLOATS]))


def _tolerance(module: nn.Module, dtype: torch.dtype) -> float:
    """Relative rounding of a linear module. Packed ones may round activations on the way."""
    parameters = list(module.parameters())  # without any, it keeps them where only it knows
    plain = bool(parameters) and all(type(p) is nn.Parameter for p in parameters)
    if plain and all(is_wide_float(tensor.dtype) for tensor in (*parameters, *module.buffers())):
        on_cpu = all(parameter.device.type in ("cpu", "meta") for parameter in parameters)
        return max(_TOLERANCE if on_cpu else _TF32_TOLERANCE, 8 * torch.finfo(dtype).eps)
    return _PACKED_TOLERANCE


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
        The module takes no unit vectors, or is not linear.
    """
    replaced = getattr(module.__dict__.get("forward"), "__self__", None)
    if is_a(type(replaced), "peft.tuners.xlora.layer:XLoraLayer"):  # scales its adapters anew for each token
        raise _not_linear(name, module)
    module = _decompressed(module)
    device, dtypes = device_of(module), _dtypes(module, dtype)
    mixed = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    total: Tensor | None = None
    for start in range(0, size, _ROWS):
        count = min(_ROWS, size - start)
        vectors = torch.zeros(count + 1, size, dtype=torch.float32, device=device)
        vectors[:count, start : start + count].fill_diagonal_(1)  # the last one stays zero: it gives the constant
        answers = _answers(name, module, vectors, dtypes)
        if answers.dim() != 2 or len(answers) != count + 1:
            raise AdapterError(f"{name} gave {tuple(answers.shape)} for {count + 1} vectors; it is no linear module.")
        answers = answers.to(wide)
        found = answers[:count] - answers[count]
        sum_ = mixed[start : start + count].to(found.device, wide) @ found
        total = sum_ if total is None else total + sum_
        yield found
    together = _answers(name, module, torch.stack([mixed, torch.zeros_like(mixed)]), dtypes).to(wide)
    if (
        total is not None
        and not (together[0] - together[1] - total).norm() <= _tolerance(module, dtypes[0]) * total.norm()
    ):
        raise _not_linear(name, module)


def _not_linear(name: str, module: nn.Module) -> AdapterError:
    return AdapterError(
        f"{name}, a {type(module).__name__}, computes something that is not linear in its inputs, so its channels have "
        "no column norms. Remove that adapter, or use method=Pop(scorer='activation'), which needs no weights."
    )


def _decompressed(module: nn.Module) -> nn.Module:
    """The module, or a decompressed copy of one that compressed-tensors decompresses only in the model's first forward."""
    status: Any = getattr(module, "quantization_status", None)
    if (
        not same_class(type(status), "compressed_tensors.quantization:QuantizationStatus")
        or status.name != "COMPRESSED"
    ):
        return module
    from compressed_tensors.compressors import decompress_module

    twin = copy.deepcopy(module)
    decompress_module(twin)
    return twin


def _answers(name: str, module: nn.Module, vectors: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """``[n, out]``; leaves in ``dtypes`` the one that the module takes."""
    refused = None
    for dtype in dtypes:
        try:
            with asked(module):
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
        f"{one_line(refused)!r}. Load the model without quantisation, merge its adapters, or use "
        "method=Pop(scorer='activation'), which needs no weights."
    ) from refused


@contextmanager
def asked(module: nn.Module) -> Iterator[None]:
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
