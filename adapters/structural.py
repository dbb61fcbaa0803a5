"""An adapter for model types that nobody registered: FFNs found by name and shape, and verified by a probe."""

from __future__ import annotations

from torch import nn

from pop_mm.errors import AdapterError
from pop_mm.weights.experts import Experts
from pop_mm.weights.layout import FFN

from .base import Adapter, FFNPaths
from .contract import probe_records

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

    If the probe (:mod:`.contract`) finds that channels are not independent, the model is refused.
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
                    for probed in probe_records(model, self, records, capture=False).values():
                        if reason := probed.broken or probed.skipped:
                            raise AdapterError(reason)
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
