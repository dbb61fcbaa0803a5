"""An adapter for model types that nobody registered: FFNs found by name and shape, and verified by a probe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pop_mm.errors import AdapterError
from pop_mm.layout import FFN

from .base import Adapter, FFNPaths, find

_CANDIDATES = (
    FFNPaths(),
    FFNPaths(gate="gate_up_proj", up="gate_up_proj"),
    FFNPaths(gate="w1", up="w3", down="w2"),
    FFNPaths(gate="", up="up_proj", down="down_proj"),
    FFNPaths(gate="", up="c_fc", down="c_proj"),
    FFNPaths(gate="", up="dense_h_to_4h", down="dense_4h_to_h"),
    FFNPaths(gate="", up="fc1", down="fc2"),
    FFNPaths(gate="", up="fc_in", down="fc_out"),
)


class StructuralAdapter(Adapter):
    """Finds ``layers.N.<holder>.{gate, up, down}`` under the usual names and verifies each shape of FFN by a probe.

    The probe runs an FFN on random input twice: as it is, with some channels zeroed in front of the down projection, and
    narrowed to the other channels. If the results differ, the channels are not independent and the model is refused.
    """

    def projections(self, model: nn.Module) -> list[FFN]:
        """As in :class:`Adapter`, for the first known set of names that fits every decoder layer."""
        owner = _decoder_layers(model)
        holders = {
            name for layer in owner[1] for name, child in layer.named_children() if not isinstance(child, nn.ModuleList)
        }
        for names in _CANDIDATES:
            for holder in sorted(holders):
                paths = FFNPaths(holder, names.gate, names.up, names.down)
                records = [
                    ffn
                    for index, layer in enumerate(owner[1])
                    if (ffn := paths.build(f"{owner[0]}.{index}", layer, index)) is not None
                ]
                if len(records) == len(owner[1]):
                    _probe(find(owner[1][0], holder), records[0])
                    return records
        raise AdapterError(
            f"the {len(owner[1])} layers at {owner[0]!r} hold {', '.join(sorted(holders))}, and none of these has the gate, up "
            "and down projections of an FFN under a known name in every layer."
        )

    def layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """The longest ModuleList of the model."""
        return _decoder_layers(model)


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    fitting: Sequence[tuple[str, nn.ModuleList]] = [item for item in lists if len(item[1]) == wanted]
    if len(fitting) != 1:
        raise AdapterError(
            f"{len(fitting)} of its {len(lists)} module lists have config.num_hidden_layers = {wanted} items; exactly one "
            "list of decoder layers was expected."
        )
    return fitting[0]


@torch.no_grad()
def _probe(holder: nn.Module | None, ffn: FFN) -> None:
    """Check on random input that channels are independent of each other, and that the down projection is called."""
    reason = ffn.why_not_plain()
    if holder is None or reason:
        raise AdapterError(f"{ffn.name} cannot be probed: {reason}.")
    width = max(1, ffn.size // 2)
    weight = ffn.down.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, ffn.hidden_size, generator=generator).to(weight.device, weight.dtype)

    def zero(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        h = args[0].clone()
        h[..., width:] = 0
        return (h, *args[1:])

    def output() -> torch.Tensor:
        result = holder(x)
        return result[0] if isinstance(result, tuple) else result

    narrowed = [p.module for p in ffn.projections]
    try:
        handle = ffn.down.module.register_forward_pre_hook(zero)
        masked = output()
        handle.remove()
        for p in ffn.projections:
            p.module.forward = lambda h, p=p: p.narrow_forward(h, width)
        narrow = output()
    except Exception as error:
        raise AdapterError(f"{ffn.name} does not run on {tuple(x.shape)} alone: {error}") from error
    finally:
        handle.remove()
        for module in narrowed:
            module.__dict__.pop("forward", None)
    scale = float(masked.abs().max())
    if not (scale > 0 and torch.allclose(masked, narrow, rtol=0, atol=scale * 50 * torch.finfo(masked.dtype).eps)):
        raise AdapterError(
            f"{ffn.name} gives another result on half of its channels than with the other half zeroed, so its channels are "
            "not independent."
        )
