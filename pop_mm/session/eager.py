"""Parts of a model that somebody has compiled: inside a session those around FFNs run eagerly.

Compiled code does not look at hooks, nor at most attributes, once it has been traced: it would go on without what a session
adds to the modules.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import FrameType, MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from ..patching import Patches
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN


class CompiledParts:
    """Compiled modules on the way from a model to its FFNs, or within these.

    Parameters
    ----------
    model : nn.Module
    records : iterable of FFN, Experts or InputGroup
        Of all its FFNs.

    Attributes
    ----------
    left : set of nn.Module
        What stays within compiled code, so that nothing can be put in the place of its forwards.
    """

    def __init__(self, model: nn.Module, records: Iterable[FFN | Experts | InputGroup]) -> None:
        self._model = model
        ffns = {module for record in records for module in record.modules}
        around = {child for module in ffns for child in module.modules()} | set(modules_around(model, ffns))
        for record in records:
            if isinstance(record, FFN) and record.holder is not None:
                around.update(record.holder.modules())
        compiled = [(name, module) for name, module in model.named_modules() if is_compiled(module)]
        self._named = [(name, module) for name, module in compiled if module in around]
        self.left = {child for _, module in compiled if module not in around for child in module.modules()}
        self._patches = Patches()

    def suspend(self) -> None:
        """Let them run eagerly, until :meth:`resume`."""
        for _, module in self._named:
            _make_eager(module, self._patches)

    def resume(self) -> None:
        """Let them run compiled again."""
        self._patches.undo()

    def warn(self) -> None:
        """Say so, if there are any."""
        if self._named:
            first = self._named[0][0] or type(self._model).__name__
            more = f" and {len(self._named) - 1} more" if len(self._named) > 1 else ""
            warnings.warn(
                f"{first}{more} of the model was compiled before the session. It runs eagerly inside the session, because "
                "compiled code skips what the session adds, and compiled again afterwards. For compiled decode steps, call "
                "generate(cache_implementation='static') inside the session.",
                stacklevel=3,
            )

    def __enter__(self) -> CompiledParts:
        self.suspend()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()


_Record = TypeVar("_Record", FFN | Experts, InputGroup)


def without_wrappers(record: _Record) -> _Record:
    """A record whose modules are those that ``torch.compile`` was given, not what it returned."""
    if isinstance(record, InputGroup):
        return replace(record, modules=tuple(map(_inner, record.modules)))
    if isinstance(record, Experts):
        return record if _inner(record.module) is record.module else replace(record, module=_inner(record.module))
    modules = [module for module in (*record.modules, record.holder, record.activation) if module is not None]
    if all(_inner(module) is module for module in modules):
        return record
    return replace(
        record,
        inputs=tuple(replace(p, module=_inner(p.module)) for p in record.inputs),
        down=replace(record.down, module=_inner(record.down.module)),
        holder=None if record.holder is None else _inner(record.holder),
        activation=None if record.activation is None else _inner(record.activation),
    )


def modules_around(model: nn.Module, wanted: set[nn.Module]) -> Iterator[nn.Module]:
    """Modules of the tree that are one of those or have one somewhere below them."""
    found: dict[nn.Module, bool] = {}

    def holds(module: nn.Module) -> bool:
        if module not in found:
            found[module] = False  # a cycle adds nothing
            below = [holds(child) for child in module.children()]
            found[module] = module in wanted or any(below)
        return found[module]

    holds(model)
    return (module for module, yes in found.items() if yes)


def _inner(module: nn.Module) -> nn.Module:
    """What ``torch.compile`` was given, if it returned this module."""
    inner = module._modules.get("_orig_mod")
    return module if inner is None else _inner(inner)


def _original(function: Any) -> Any:
    """What ``torch.compile`` was given, if it returned this function."""
    while hasattr(function, "_torchdynamo_orig_callable") and not getattr(function, "_torchdynamo_disable", False):
        function = function._torchdynamo_orig_callable
    return function


def is_compiled(module: nn.Module) -> bool:
    """Whether a call of the module runs compiled code."""
    if module._modules.get("_orig_mod") is not None or module.__dict__.get("_compiled_call_impl") is not None:
        return True
    forward = module.__dict__.get("forward", type(module).forward)
    return _original(forward) is not forward


class EagerCalls:
    """While it is held, whatever ``torch.compile`` returned runs eagerly, in the whole process.

    Functions around a model, and wrappers of it that nobody named, would else run code that was traced without what a session
    adds. Nothing is done where torch's compiler has not been loaded: then there is no such code.
    """

    _holders = 0
    _stance: Any = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.held = False

    def hold(self) -> None:
        """Begin, if the compiler is loaded."""
        if self.held or "torch._dynamo.eval_frame" not in sys.modules:
            return
        with EagerCalls._lock:
            if not EagerCalls._holders:
                EagerCalls._stance = torch.compiler.set_stance("force_eager")
            EagerCalls._holders += 1
            self.held = True

    def release(self) -> None:
        """End; code runs compiled again once nobody holds it."""
        with EagerCalls._lock:
            if self.held:
                self.held = False
                EagerCalls._holders -= 1
                if not EagerCalls._holders:
                    EagerCalls._stance.__exit__(None, None, None)

    def compiled(self) -> AbstractContextManager[object]:
        """Within: code runs compiled all the same."""
        return torch.compiler.set_stance("default") if self.held else nullcontext()


def in_compiled_call() -> bool:
    """Whether what runs now was called through something that ``torch.compile`` returned."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename == compiler.__file__:
            return True
        frame = frame.f_back
    return False


def _make_eager(module: nn.Module, patches: Patches) -> None:
    """Make one module run eagerly."""
    own = module.__dict__
    if own.get("_compiled_call_impl") is not None:
        patches.replace(module, "_compiled_call_impl", None)
    wrapped = module._modules.get("_orig_mod")
    forward = own.get("forward", type(module).forward)
    eager = _original(forward)
    if wrapped is not None:
        patches.replace(module, "forward", wrapped)
    elif eager is forward:
        return
    elif "forward" not in own:  # the class's forward is compiled
        patches.replace(module, "forward", MethodType(eager, module))
    elif getattr(eager, "__func__", None) is type(module).forward:
        patches.remove(module, "forward")
    else:
        patches.replace(module, "forward", eager)
