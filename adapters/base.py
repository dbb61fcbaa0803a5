"""What an adapter is: a table that says where a model's FFN projections are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn

from pop_mm.errors import AdapterError
from pop_mm.formats.asking import activation_dtype
from pop_mm.methods.ratio import LayerWeights
from pop_mm.weights.experts import LAYOUT_FLAGS, Experts, layout_of
from pop_mm.weights.groups import InputGroup, linear_features
from pop_mm.weights.layout import FFN, PLAIN_TYPES, Projection, Role

from .inputs import ATTENTION, InputPaths

Kind = Literal["dense", "moe", "vlm"]
_EPSILONS = ("eps", "variance_epsilon")


@dataclass(frozen=True)
class FFNPaths:
    """Where the projections of one FFN are, as paths from a decoder layer.

    Attributes
    ----------
    holder : str
        Path of the module that holds the projections; ``""`` if they sit on the layer itself.
    gate, up, down : str
        Names in the holder. ``gate=""`` is an ungated FFN; ``gate == up`` is a fused projection, gate rows first.
    transposed : bool
        Weights are stored ``[in, out]`` (transformers' Conv1D).
    plain_types : tuple of type or str
        Module classes whose forward is just ``x @ W.T + b``, or ``"module:Class"`` for one that is not imported here.
        Subclasses are not plain.
    role : {"dense", "shared_expert"}
    activation : tuple of str
        Names under which the holder may keep its activation.
    """

    holder: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    transposed: bool = False
    plain_types: tuple[type[nn.Module] | str, ...] = PLAIN_TYPES
    role: Role = "dense"
    activation: tuple[str, ...] = ("act_fn", "activation_fn", "act")

    @property
    def layout(self) -> str:
        """The layout in words."""
        suffix = ", transposed" if self.transposed else ""
        if not self.gate:
            return f"{self.up}, {self.down} (ungated{suffix})"
        if self.gate == self.up:
            return f"{self.up} (fused{suffix}), {self.down}"
        return f"{self.gate}, {self.up}, {self.down}{suffix}"

    def build(self, layer_name: str, layer: nn.Module, index: int) -> FFN | None:
        """The record of this FFN in one layer, or None if the layer has no such FFN."""
        holder = find(layer, self.holder)
        names = list(dict.fromkeys(filter(None, (self.gate, self.up))))
        modules = [find(holder, name) for name in (*names, self.down)] if holder is not None else [None]
        if any(module is None for module in modules):
            return None
        prefix = ".".join(filter(None, (layer_name, self.holder)))
        fused = 2 if self.gate and self.gate == self.up else 1

        def projection(name: str, side: Literal["out", "in"], blocks: int) -> Projection:
            module = find(holder, name)
            assert module is not None
            return Projection(f"{prefix}.{name}", module, side, blocks, self.transposed, self.plain_types)

        down = projection(self.down, "in", 1)
        size = down.features("in")
        inputs = tuple(projection(name, "out", fused) for name in names)
        for p in inputs:
            if p.features("out") != fused * size:
                raise AdapterError(
                    f"{p.name} has {p.features('out')} outputs, but {down.name} takes {size} inputs"
                    f"{' (gate and up are fused, so twice as many were expected)' if fused == 2 else ''}. The "
                    "adapter's paths do not fit this model."
                )
        module = holder if self.holder else None
        activation = next((found for name in self.activation if (found := find(module, name)) is not None), None)
        return FFN(
            prefix, index, inputs, down, size, self.role, self.layout, module, activation, activation_dtype(layer)
        )


@dataclass(frozen=True)
class ExpertPaths:
    """Where the routed experts of a layer are, as a path from a decoder layer.

    Attributes
    ----------
    experts : str
        Path of the module that transformers dispatches through its ExpertsInterface.
    top_k : str
        Name of the config's field that says how many experts a token is routed to: one number, or one for each layer.
    layout : str
        The layout in words, for the support table.
    """

    experts: str = "mlp.experts"
    top_k: str = "num_experts_per_tok"
    layout: str = "experts.{gate_up_proj, down_proj} (3-D)"

    def build(self, layer_name: str, layer: nn.Module, index: int) -> Experts | None:
        """The record of this layer's experts, or None if the layer has none."""
        module = find(layer, self.experts)
        if module is None:
            return None
        name = join(layer_name, self.experts)
        if not all(hasattr(module, flag) for flag in LAYOUT_FLAGS):
            raise AdapterError(
                f"{name} is a {type(module).__name__}, which transformers does not dispatch through its ExpertsInterface "
                "(quantised and LoRA-wrapped experts are replaced by modules of their own), so pop_mm cannot reach its "
                "channels. Load the model without quantisation, or merge its adapters (peft: merge_and_unload())."
            )
        if reason := Experts(name, index, module, 0).why_unknown():
            raise AdapterError(
                f"{name} is a {type(module).__name__}, and {reason}, so pop_mm cannot compute with it. Load the model "
                "without quantisation."
            )
        top_k = getattr(module.config, self.top_k, None)
        if isinstance(top_k, Sequence):
            top_k = top_k[index]
        if not isinstance(top_k, int):
            raise AdapterError(
                f"{type(module.config).__name__} has no {self.top_k}; it should say how many experts a token uses."
            )
        return Experts(name, index, module, top_k, layout_of(module))


class Adapter:
    """Base of all adapters. A subclass is a table; it needs code only where an architecture is unusual.

    Attributes
    ----------
    kind : {"dense", "moe", "vlm"}
    ffns : sequence of FFNPaths
        Every FFN that a decoder layer can have; shared experts are FFNs with that role (in a layer without routed
        experts they share with nobody, and count as dense).
    experts : sequence of ExpertPaths
        Every set of routed experts that a decoder layer can have.
    not_weights : sequence of str
        Paths from a decoder layer of modules that count neither as attention nor as FFN weights: routers, the gates of
        shared experts.
    inputs : sequence of InputPaths
        Attention modules that share an input, for the method ``thresholds``.
    """

    kind: ClassVar[Kind] = "dense"
    ffns: ClassVar[Sequence[FFNPaths]] = ()
    experts: ClassVar[Sequence[ExpertPaths]] = ()
    not_weights: ClassVar[Sequence[str]] = ()
    inputs: ClassVar[Sequence[InputPaths]] = ATTENTION

    @classmethod
    def layout(cls) -> str:
        """The layout in words, for the support table."""
        layouts = [experts.layout for experts in cls.experts]
        for paths in cls.ffns:
            role = f"{paths.role.replace('_', ' ')}: " if cls.experts else ""
            layouts.append(role + paths.layout)
        return "; ".join(dict.fromkeys(layouts))

    def check(self, model: nn.Module) -> None:
        """Raise :class:`~pop_mm.errors.AdapterError` if this very model cannot be pruned, saying why."""

    def layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """Name and list of the decoder layers: the longest ModuleList whose items hold an FFN or experts."""
        paths = [join(ffn.holder, ffn.down) for ffn in self.ffns] + [experts.experts for experts in self.experts]
        found = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and any(find(layer, path) is not None for layer in module for path in paths)
        ]
        if not found:
            raise AdapterError(
                f"{type(self).__name__} found no decoder layer with {' or '.join(paths)} in {type(model).__name__}: nothing "
                "can be pruned."
            )
        return max(found, key=lambda item: len(item[1]))

    def projections(self, model: nn.Module) -> Sequence[FFN | Experts]:
        """One record for each prunable FFN, layer by layer. Finding none, or not all experts, is an error."""
        self.check(model)
        records = self.records(*self.layers(model), model)
        if not records:
            raise AdapterError(f"{type(self).__name__} found no prunable FFN in {type(model).__name__}.")
        return records

    def records(self, name: str, layers: nn.ModuleList, model: nn.Module) -> list[FFN | Experts]:
        """One record for each prunable FFN of these layers; ``name`` is theirs in ``model``."""
        records: list[FFN | Experts] = []
        for index, layer in enumerate(layers):
            layer_name = join(name, str(index))
            ffns = [ffn for paths in self.ffns if (ffn := paths.build(layer_name, layer, index)) is not None]
            experts = [e for paths in self.experts if (e := paths.build(layer_name, layer, index)) is not None]
            self._check_experts(layer_name, layer, experts)
            records += ffns if experts else [replace(ffn, role="dense") for ffn in ffns]
            records += experts
        return records

    def _check_experts(self, name: str, layer: nn.Module, found: Sequence[Experts]) -> None:
        """Experts that the adapter does not know would stay unpruned, and nobody would notice."""
        known = {part for experts in found for part in experts.module.modules()}  # torch.compile wraps them
        for path, module in layer.named_modules():
            if module not in known and all(hasattr(module, flag) for flag in LAYOUT_FLAGS):
                raise AdapterError(
                    f"{type(self).__name__} does not know the experts at {join(name, path)} ({type(module).__name__}). "
                    "Without them, most weights would stay unpruned. Register an adapter that lists this path in its "
                    "experts."
                )

    def layer_weights(self, model: nn.Module, records: Sequence[FFN | Experts]) -> dict[int, LayerWeights]:
        """Attention and FFN weights of every layer (of each FFN's layer, and of layers without one).

        Every matrix in a layer that is neither an FFN's nor a norm's nor in :attr:`not_weights` counts as attention. Of
        routed experts the top-k count; shared experts do not (paper, table 8).
        """
        _, layers = self.layers(model)
        result = {}
        for index, layer in enumerate(layers):
            ffns = [ffn for ffn in records if ffn.layer == index]
            others = {module for ffn in ffns for module in ffn.modules}
            others.update(module for path in self.not_weights if (module := find(layer, path)) is not None)
            attention = _weight_count(layer, others)
            counted = (ffn.weight_count for ffn in ffns if ffn.role != "shared_expert")
            result[index] = LayerWeights(attention, sum(counted))
        return result

    def input_groups(self, model: nn.Module) -> list[InputGroup]:
        """One record for each set of attention modules that share an input, layer by layer."""
        return self.groups(*self.layers(model), model)

    def groups(self, name: str, layers: nn.ModuleList, model: nn.Module) -> list[InputGroup]:
        """Those of these layers; ``name`` is theirs in ``model``."""
        found = [
            paths.build(join(name, str(index)), layer, index)
            for index, layer in enumerate(layers)
            for paths in self.inputs
        ]
        return [group for group in found if group is not None]

    def head(self, model: nn.Module) -> InputGroup | None:
        """The lm_head and what gives it its input; None if the model does not say which it is."""
        head = getattr(model, "get_output_embeddings", lambda: None)()
        source = getattr(model, "get_decoder", lambda: None)()
        if head is None or linear_features(head) is None or source is None or source is model:
            return None
        name = next((name for name, module in model.named_modules() if module is head), "lm_head")
        words = getattr(model, "get_input_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        tied = words if weight is not None and getattr(words, "weight", None) is weight else None
        count = len(self.layers(model)[1])
        return InputGroup(name, count, (head,), "lm_head", "lm_head", source, tied)

    def besides_ffns(self, model: nn.Module, records: Sequence[FFN | Experts]) -> list[nn.Module]:
        """What a decoded token runs besides FFNs: all other modules of the decoder layers, and the lm_head.

        What :attr:`not_weights` names is left out: a router's choice should not hang on a kernel's rounding.
        """
        _, layers = self.layers(model)
        known = {module for record in records for module in record.modules}
        for layer in layers:
            known.update(part for path in self.not_weights for part in (find(layer, path) or nn.Module()).modules())
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [*(module for layer in layers for module in layer.modules()), *([head] if head is not None else [])]
        return [module for module in dict.fromkeys(found) if module not in known]

    def modality_token_ids(self, model: nn.Module) -> dict[str, int]:
        """Which token id stands for the positions of which other modality ("image", "video") in ``input_ids``."""
        return {}


class RefusedAdapter(Adapter):
    """Base of adapters for architectures that cannot be pruned, so that nobody falls back to their looks.

    Attributes
    ----------
    reason : str
        Why, as the end of the sentence "pop_mm does not prune this model type: ...".
    """

    reason: ClassVar[str]

    @classmethod
    def layout(cls) -> str:
        """The reason instead of a layout."""
        return f"refused: {cls.reason}"

    def check(self, model: nn.Module) -> None:
        """Always refuse."""
        raise AdapterError(f"pop_mm does not prune {type(model).__name__}: {self.reason}.")


def find(module: nn.Module | None, path: str) -> nn.Module | None:
    """The submodule at a dotted path, or None."""
    for part in filter(None, path.split(".")):
        module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module


def join(*parts: str) -> str:
    """A dotted path of these parts, leaving out empty ones."""
    return ".".join(filter(None, parts))


def _weight_count(module: nn.Module, counted: set[nn.Module]) -> int:
    """Weights in a module without biases, norms and embeddings; what stands for a linear module counts as that one.

    Modules in ``counted``, with all they hold, count nothing; every module that is seen is added to it.
    """
    if module in counted or isinstance(module, nn.Embedding) or _is_norm(module):
        return 0
    counted.add(module)
    if (compiled := module._modules.get("_orig_mod")) is not None:  # torch.compile returned this module
        return _weight_count(compiled, counted)
    out, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if out is not None and inputs is not None:
        return int(out) * int(inputs)
    own = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)
    return own + sum(_weight_count(child, counted) for child in module.children())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module without others in it keeps from dividing by zero: so every norm does, of torch or of an architecture.

    Some norms hold matrices, such as those of Cohere and Chameleon, with one row for each head.
    """
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return True
    return not module._modules and any(isinstance(getattr(module, name, None), float) for name in _EPSILONS)
