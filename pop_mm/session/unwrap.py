"""From what people hold in their hands to the model in it: peft, ``torch.compile``, pipelines, parallel wrappers.

Wrappers are told by their classes, in packages that are loaded already: none is imported for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ..classes import is_a
from ..errors import AdapterError
from ..patching import Patches
from .spread import refuse_spread


@dataclass(frozen=True, eq=False)
class Unwrapped:
    """A model, and the wrappers that its caller may go on using.

    Attributes
    ----------
    model : nn.Module
        The model itself: what is pruned.
    wrappers : tuple of nn.Module
        From the outermost to the one right around the model.
    """

    model: nn.Module
    wrappers: tuple[nn.Module, ...] = ()

    def install(self, patches: Patches) -> None:
        """Make a plain forward of a wrapper a call of what is in it, hooks included.

        Otherwise a compiled wrapper would run what it traced before the hooks were there, and most of peft's would call
        ``model.forward``, past all hooks.
        """
        for wrapper in self.wrappers:
            if _is(wrapper, _COMPILED):
                patches.replace(wrapper, "forward", wrapper._orig_mod)
            elif _is_tuner(wrapper):
                patches.replace(wrapper, "forward", _forward_of(wrapper))


def unwrap(model: object) -> Unwrapped:
    """The model in its wrappers.

    Wrappers whose forward and ``generate`` are those of the model in them are taken off: ``peft.PeftModel`` (of all
    tuners that keep the model's inputs), ``torch.compile(model)``. ``accelerate`` changes a model in place, so there is
    nothing to take off.

    Raises
    ------
    AdapterError
        No model, or a wrapper that cannot be taken off; the message says what to pass instead.
    """
    wrappers: list[nn.Module] = []
    while True:
        _refuse(model)
        if not isinstance(model, nn.Module):
            raise AdapterError(f"pop_mm prunes transformers models; got {_described(model)}.")
        inner = _inner(model)
        if inner is None:
            refuse_spread(model)
            return Unwrapped(model, tuple(wrappers))
        wrappers.append(model)
        model = inner


def _inner(model: nn.Module) -> nn.Module | None:
    """What is in a wrapper, or None if it is none."""
    inner: Any = None
    if _is(model, _COMPILED):
        inner = model._orig_mod
    elif _is_peft(model):
        _refuse_peft(model)
        inner = model.base_model
    elif _is_tuner(model):
        inner = model.model
    return inner if isinstance(inner, nn.Module) else None


def _forward_of(tuner: Any) -> Callable[..., Any]:
    """A tuner's own forward, with a call of the model where it runs ``model.forward``."""
    if type(tuner).forward is nn.Module.forward:  # it took over the model's own as an attribute
        return partial(_call, tuner)
    return partial(type(tuner).forward, _Through(tuner))


def _call(tuner: Any, *args: Any, **kwargs: Any) -> Any:
    return tuner.model(*args, **kwargs)


class _Called:
    """A model whose ``forward`` is a call of it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)

    forward = __call__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Through:
    """A tuner that holds such a model."""

    def __init__(self, tuner: Any) -> None:
        self._tuner = tuner
        self.model = _Called(tuner.model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tuner, name)


# refusals -----------------------------------------------------------------------------------------------------------

_PARALLEL = ("torch.nn.parallel.data_parallel:DataParallel", "torch.nn.parallel.distributed:DistributedDataParallel")
_SHARDED = "torch.distributed.fsdp.fully_sharded_data_parallel:FullyShardedDataParallel"
_NO_MODELS = {  # what people pass instead of a model -> what it is, and what to do
    "transformers.pipelines.base:Pipeline": ("a pipeline", "Pass pipe.model, and go on calling the pipeline."),
    "transformers.trainer:Trainer": ("a trainer", "Pass trainer.model, in eval mode."),
    "transformers.processing_utils:ProcessorMixin": ("a processor", "Pass the model."),
    "transformers.tokenization_utils_base:PreTrainedTokenizerBase": ("a tokenizer", "Pass the model."),
    "transformers.image_processing_base:ImageProcessingMixin": ("an image processor", "Pass the model."),
    "transformers.configuration_utils:PreTrainedConfig": (
        "a config",
        "Load the model, e.g. with AutoModelForCausalLM.from_pretrained(...), and pass that.",
    ),
}


def _refuse(model: object) -> None:
    if model is None:
        raise AdapterError("pop_mm prunes transformers models; got None. Pass the model.")
    if isinstance(model, type):
        raise AdapterError(
            f"pop_mm prunes a model, not its class; got the class {model.__name__}. Pass an instance, e.g. "
            f"{model.__name__}.from_pretrained(...)."
        )
    if isinstance(model, str):
        raise AdapterError(
            f"pop_mm prunes a loaded model, not a name; got {model!r}. Pass "
            "AutoModelForCausalLM.from_pretrained(...) of it."
        )
    for cls, (kind, advice) in _NO_MODELS.items():
        if _is(model, cls):
            raise AdapterError(f"{type(model).__name__} is {kind}, not a model. {advice}")
    if _is(model, *_PARALLEL):
        raise AdapterError(
            f"{type(model).__name__} runs copies of the model, or parts of a batch, which one session cannot follow. Pass "
            "model.module, and call generate of that."
        )
    if _is(model, _SHARDED):
        raise AdapterError(
            "FullyShardedDataParallel keeps flat shards of the weights, whose channels cannot be told apart. Load the "
            "model without it."
        )


def _refuse_peft(model: Any) -> None:
    configs = {name: model.peft_config[name] for name in _active(model) if name in model.peft_config}
    for name, config in configs.items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning:
            raise AdapterError(
                f"The adapter {name!r} of this {type(model).__name__} is prompt learning ({kind}): virtual tokens that peft "
                "puts in front of the prompt, past the model's own inputs, so pop_mm cannot tell prompt from decode steps. "
                "Prune the model under it with prune(model.get_base_model()), without the virtual tokens, or train "
                "an adapter of the weights, such as LoRA."
            )
    if _is(model.base_model, "peft.tuners.xlora.model:XLoraModel"):
        raise AdapterError(
            f"This {type(model).__name__} is X-LoRA, which runs the model twice for every step, so pop_mm cannot tell prompt "
            "from decode steps. Use a single LoRA adapter."
        )


def _active(model: Any) -> list[str]:
    active = model.active_adapters if hasattr(model, "active_adapters") else model.active_adapter
    return [active] if isinstance(active, str) else list(active)


# classes of packages that may not be there --------------------------------------------------------------------------


_COMPILED = "torch._dynamo.eval_frame:OptimizedModule"


def _is(thing: object, *classes: str) -> bool:
    return is_a(type(thing), *classes)


def _is_peft(model: object) -> bool:
    return _is(model, "peft.peft_model:PeftModel", "peft.mixed_model:PeftMixedModel")


def _is_tuner(model: object) -> bool:
    return _is(model, "peft.tuners.tuners_utils:BaseTuner", "peft.tuners.adaption_prompt.model:AdaptionPromptModel")


def _described(thing: object) -> str:
    text = repr(thing)
    return f"{type(thing).__name__} {text if len(text) < 60 else text[:57] + '...'}"


__all__ = ["Unwrapped", "unwrap"]
