"""An adapter for model types that nobody registered: FFNs found by name and shape, and verified by a probe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pop_mm.errors import AdapterError
from pop_mm.experts import Experts
from pop_mm.layout import FFN, Projection

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
    """Finds ``layers.N.<holder>.{gate, up, down}`` under the usual names and verifies each kind of FFN by a probe.

    The probe runs an FFN on random input with a random half of its channels zeroed in front of the down projection, and
    again on the other half alone. If the results differ, the channels are not independent and the model is refused.
    """

    def records(self, name: str, layers: nn.ModuleList, model: nn.Module) -> list[FFN | Experts]:
        """As in :class:`Adapter`, for the first known set of names that fits every decoder layer."""
        children = {name for layer in layers for name, _ in layer.named_children()}
        if any("experts" in path.split(".") for path, _ in layers.named_modules()):
            raise AdapterError(
                f"the layers at {name!r} hold experts. Without an adapter that knows them, most weights would "
                "stay unpruned."
            )
        for names in _CANDIDATES:
            for holder in sorted(children):
                paths = FFNPaths(holder, names.gate, names.up, names.down)
                records = _records(paths, name, layers)
                if len(records) == len(layers):
                    _probe_all(layers, records, holder)
                    return list(records)
        raise AdapterError(
            f"the {len(layers)} layers at {name!r} hold {', '.join(sorted(children))}, and none of these has the gate, "
            "up and down projections of an FFN under a known name in every layer."
        )

    def layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """The only ModuleList with ``config.num_hidden_layers`` items."""
        return _decoder_layers(model)


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    config = getattr(model, "config", None)
    wanted = getattr(config, "num_hidden_layers", None)
    if wanted is None and hasattr(config, "text_config"):
        raise AdapterError(
            "it has several towers, and nothing says which is the language model: that takes a subclass of "
            "pop_mm.adapters.VisionLanguageAdapter whose tower is the path to it."
        )
    fitting: list[tuple[str, nn.ModuleList]] = []
    for name, module in lists:
        nested = any(name.startswith(f"{outer}.") for outer, _ in fitting)
        if len(module) == wanted and not nested:
            fitting.append((name, module))
    if len(fitting) != 1:
        raise AdapterError(
            f"{len(fitting)} of its {len(lists)} module lists have config.num_hidden_layers = {wanted} items; exactly "
            "one list of decoder layers was expected."
        )
    return fitting[0]


def _records(paths: FFNPaths, name: str, layers: nn.ModuleList) -> list[FFN]:
    """The FFNs at these paths, none if the shapes do not fit."""
    try:
        built = [paths.build(f"{name}.{index}", layer, index) for index, layer in enumerate(layers)]
    except AdapterError:
        return []
    return [ffn for ffn in built if ffn is not None]


def _probe_all(layers: nn.ModuleList, records: Sequence[FFN], holder: str) -> None:
    """Probe one FFN of each class, size and set of scalar settings (a threshold may apply to some layers only)."""
    probed = set()
    for layer, ffn in zip(layers, records, strict=True):
        module = find(layer, holder)
        assert module is not None
        settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, int | float | str))
        if (kind := (type(module), ffn.size, settings)) not in probed:
            _probe(module, ffn)
            probed.add(kind)


@torch.no_grad()
def _probe(holder: nn.Module, ffn: FFN) -> None:
    """Check on random input that channels are independent of each other, and that the projections are called.

    It runs in float32, whatever the weights' dtype, so that rounding cannot hide a difference.
    """
    if reason := ffn.why_not_plain():
        raise AdapterError(f"{ffn.name} cannot be probed: {reason}.")
    if any(parameter.device.type == "meta" for parameter in holder.parameters()):
        raise AdapterError(f"{ffn.name} cannot be probed: it is on the meta device, without weights. Load the model.")
    device = ffn.down.weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, ffn.hidden_size, generator=generator).to(device)
    channels = torch.randperm(ffn.size, generator=generator)[: (ffn.size + 1) // 2].to(device)
    keep = torch.zeros(ffn.size, device=device).index_fill_(0, channels, 1)
    everything = torch.arange(ffn.size, device=device)
    dense = _run(holder, ffn, x, everything, torch.ones_like(keep))
    masked = _run(holder, ffn, x, everything, keep)
    narrow = _run(holder, ffn, x, channels, keep[channels])
    tolerance = 1e-4 * float(dense.abs().max())
    if torch.allclose(dense, masked, rtol=0, atol=tolerance):
        raise AdapterError(
            f"{ffn.name} gives the same result without half of its channels: its projections are not called."
        )
    if narrow.shape != masked.shape or not torch.allclose(masked, narrow, rtol=0, atol=tolerance):
        raise AdapterError(
            f"{ffn.name} gives another result on half of its channels than with the other half zeroed, so its "
            "channels are not independent."
        )


def _run(holder: nn.Module, ffn: FFN, x: Tensor, channels: Tensor, keep: Tensor) -> Tensor:
    """Output of the FFN on these channels, those zeroed in front of the down projection that ``keep`` (0 or 1) says."""

    def forward(p: Projection) -> Callable[[Tensor], Tensor]:
        weight, bias = p.linear_weight().float(), None if p.bias is None else p.bias.float()
        if p.side == "in":
            return lambda h: F.linear(h.float() * keep, weight[:, channels], bias)
        rows = torch.cat([channels + block * ffn.size for block in range(p.blocks)])
        return lambda h: F.linear(h.float(), weight[rows], None if bias is None else bias[rows])

    training = {module: module.training for module in holder.modules()}
    try:
        holder.eval()
        for p in ffn.projections:
            p.module.forward = forward(p)
        output = holder.forward(x)
    except Exception as error:
        raise AdapterError(
            f"{ffn.name} does not run on {len(channels)} of its {ffn.size} channels and an input of shape "
            f"{tuple(x.shape)} alone ({type(error).__name__}: {error})."
        ) from error
    finally:
        for p in ffn.projections:
            p.module.__dict__.pop("forward", None)
        for module, mode in training.items():
            module.training = mode
    return output[0] if isinstance(output, tuple) else output
