"""Bytes of a quantised checkpoint's weights, as its files store them: scales and zero points too, biases not."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..adapters import Adapter
from ..report.footprint import itemsize
from ..weights.experts import Experts
from ..weights.groups import InputGroup
from ..weights.layout import FFN, linear_weight_count

_BITS = ("bits", "nbits", "num_bits", "w_bit", "weight_bits")


class StoredBytes:
    """Bytes that the weights of modules take where they are packed.

    Parameters
    ----------
    model : nn.Module
        Its skeleton.
    tensors : mapping of str to int
        Name of a tensor in the checkpoint -> its bytes; empty if the files cannot be read.
    bits : float
        Of a weight in a quantised module, for modules that no tensor belongs to.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, int], bits: float) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._matrices = {
            name
            for name, module in model.named_modules()
            if any(p.dim() >= 2 for p in module.parameters(recurse=False))
        }
        self._bits = bits
        self._itemsize = itemsize(model)
        self._bytes: dict[str, int] = {}
        for name, size in tensors.items():
            module, _, own = name.rpartition(".")
            if own != "bias":
                self._bytes[module] = self._bytes.get(module, 0) + size

    def of_record(self, record: FFN | Experts | InputGroup) -> float:
        """Bytes that a decoded token reads of a dense FFN, of experts, or of attention modules that share an input."""
        if isinstance(record, Experts):
            whole = sum(size for name, size in self._bytes.items() if f"{name}.".startswith(f"{record.name}."))
            return whole * record.top_k / record.count if whole else record.weight_count * self._bits / 8
        named = [(p.module, p.name) for p in record.projections] if isinstance(record, FFN) else []
        named = named or [(module, self._names[module]) for module in record.modules]
        return sum(self._of(name, linear_weight_count(module)) for module, name in named)

    def of_attention(self, model: nn.Module, adapter: Adapter, count: int) -> float:
        """Bytes of everything in the decoder layers that counts as attention; ``count`` weights."""
        prefix, _ = adapter.layers(model)
        records = adapter.projections(model)
        others = [record.name for record in records if isinstance(record, Experts)]
        others += [p.name for record in records if isinstance(record, FFN) for p in record.projections]
        found = 0
        for name, size in self._bytes.items():
            layer, _, path = name.removeprefix(f"{prefix}.").partition(".")
            if not name.startswith(f"{prefix}.") or not layer.isdigit() or path in adapter.not_weights:
                continue
            of_ffn = any(f"{name}.".startswith(f"{other}.") for other in others)
            found += size if name in self._matrices and not of_ffn else 0
        return found or count * self._bits / 8

    def of_head(self, head: nn.Module, count: int) -> float:
        """Bytes of the lm_head, which is seldom packed."""
        return self._bytes.get(self._names.get(head, ""), count * self._itemsize)

    def _of(self, name: str, count: int) -> float:
        return self._bytes.get(name) or count * self._bits / 8


def stored_tensors(source: str) -> dict[str, int]:
    """Bytes of every tensor of the safetensors files in a folder, from their headers; empty if there are none."""
    tensors: dict[str, int] = {}
    for file in sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else ():
        with open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            for name, entry in json.loads(stream.read(length)).items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    tensors[name] = stop - start
    return tensors


def bits_of(quantisation: Mapping[str, Any], itemsize: int) -> float:
    """Bits of a weight that a ``quantization_config`` names; those of the model's dtype if it names none."""
    for flag, bits in ("load_in_4bit", 4.0), ("load_in_8bit", 8.0):
        if quantisation.get(flag):
            return bits
    named = {"fp8": 8.0, "fbgemm_fp8": 8.0, "finegrained_fp8": 8.0, "mxfp4": 4.25, "bitnet": 2.0}
    found = next(_named_bits(quantisation), None)
    return found or named.get(str(quantisation.get("quant_method")), 8.0 * itemsize)


def _named_bits(values: Any) -> Iterator[float]:
    if isinstance(values, Mapping):
        yield from (float(v) for k, v in values.items() if k in _BITS and isinstance(v, int | float))
        for value in values.values():
            yield from _named_bits(value)
