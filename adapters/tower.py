"""What an adapter of a vision-language model is: where its language tower is, and what serves the text model in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from pop_mm.errors import AdapterError
from pop_mm.methods.ratio import LayerWeights
from pop_mm.weights.experts import Experts
from pop_mm.weights.groups import InputGroup
from pop_mm.weights.layout import FFN

from .base import Adapter, find, join
from .lookup import adapter_for

IMAGE = {"image": ("image_token_id", "image_token_index")}
IMAGE_AND_VIDEO = {**IMAGE, "video": ("video_token_id", "video_token_index")}


class VisionLanguageAdapter(Adapter):
    """Base of the adapters for vision-language models: FFNs of the language tower, and of nothing else.

    Attributes
    ----------
    tower : sequence of str
        Paths from a model to its language tower; the first that is there counts. Vision towers and projectors are beside it,
        so that nothing in them can be taken for an FFN of the language model.
    text : type of Adapter or None
        What serves the tower; None: the adapter that is registered for the model type of the tower.
    placeholders : mapping
        Modality -> names that the config may have for the token id of its positions, as paths; the first that is there counts.
    """

    kind = "vlm"
    tower: ClassVar[Sequence[str]] = ("model.language_model", "language_model")
    text: ClassVar[type[Adapter] | None] = None
    placeholders: ClassVar[Mapping[str, Sequence[str]]] = IMAGE

    @classmethod
    def layout(cls) -> str:
        """The layout of the text model."""
        return "as the text model in it" if cls.text is None else cls.text.layout()

    def find_tower(self, model: nn.Module) -> tuple[str, nn.Module]:
        """Name and module of the language tower."""
        for path in self.tower:
            if (tower := find(model, path)) is not None:
                return path, tower
        raise AdapterError(
            f"{type(self).__name__} found no language tower at {' or '.join(self.tower)} in {type(model).__name__}."
        )

    def text_adapter(self, model: nn.Module) -> Adapter:
        """The adapter of the language tower."""
        if self.text is not None:
            return self.text()
        name, tower = self.find_tower(model)
        try:
            adapter = adapter_for(tower)
            adapter.check(tower)
        except AdapterError as error:
            raise AdapterError(
                f"The language tower {name!r} of {type(model).__name__} has no adapter: {error}"
            ) from error
        if isinstance(adapter, VisionLanguageAdapter):
            raise AdapterError(
                f"The language tower {name!r} of {type(model).__name__} is a {type(tower).__name__} itself."
            )
        return adapter

    def check(self, model: nn.Module) -> None:
        """Raise :class:`~pop_mm.errors.AdapterError` if the language tower cannot be pruned, saying why."""
        self.text_adapter(model).check(self.find_tower(model)[1])

    def layers(self, model: nn.Module) -> tuple[str, nn.ModuleList]:
        """Name in the whole model and list of the language tower's layers."""
        name, tower = self.find_tower(model)
        inner, layers = self.text_adapter(model).layers(tower)
        return join(name, inner), layers

    def records(self, name: str, layers: nn.ModuleList, model: nn.Module) -> list[FFN | Experts]:
        """As the text model's adapter finds them; names start at the whole model."""
        return self.text_adapter(model).records(name, layers, model)

    def groups(self, name: str, layers: nn.ModuleList, model: nn.Module) -> list[InputGroup]:
        """As the text model's adapter finds them; names start at the whole model."""
        return self.text_adapter(model).groups(name, layers, model)

    def layer_weights(self, model: nn.Module, records: Sequence[FFN | Experts]) -> dict[int, LayerWeights]:
        """Those of the language tower alone (paper, table 8); cross-attention is attention."""
        return self.text_adapter(model).layer_weights(self.find_tower(model)[1], records)

    def modality_token_ids(self, model: nn.Module) -> dict[str, int]:
        """Modality -> the id that stands in ``input_ids`` where its features go, for those that the config names."""
        found = {}
        for modality, names in self.placeholders.items():
            ids = (_setting(model.config, name) for name in names)
            if (token := next((token for token in ids if isinstance(token, int)), None)) is not None:
                found[modality] = token
        return found


def _setting(config: Any, path: str) -> Any:
    """What is at a dotted path in a config, also in a dict of it, or None."""
    for part in path.split("."):
        config = config.get(part) if isinstance(config, Mapping) else getattr(config, part, None)
    return config
