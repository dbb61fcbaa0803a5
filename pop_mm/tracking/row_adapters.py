"""What ``peft`` puts on a model for one call with ``adapter_names=``: an adapter for each row of the batch."""

from __future__ import annotations

from functools import partial

from torch import nn

_ARGUMENTS = {"adapter_names", "alora_offsets"}


def remove_row_adapters(model: nn.Module) -> None:
    """Remove the hooks of such a call, which peft leaves on the modules when a forward in it raises.

    The next call would go on with them, and so with the adapters of rows that are gone.
    """
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, partial) and _ARGUMENTS & hook.keywords.keys() and _is_of_peft(hook.func):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _is_of_peft(function: object) -> bool:
    return str(getattr(function, "__module__", "")).partition(".")[0] == "peft"
