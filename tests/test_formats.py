"""A weight format of one's own, by the recipe of CONTRIBUTING.md: one class, named in FORMATS."""

import pytest
import torch
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

from helpers.modes import generate
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import formats, prune
from pop_mm.formats import Plain, Stored


class Own:
    name = "own"

    def holds(self, weight):
        return isinstance(weight, Int8Tensor)

    def why_not(self, weight):
        return None

    def stored(self, weight):
        return Stored(weight.qdata, weight.scale, weight.dtype)


@pytest.mark.parametrize("settings", [{"budget": 0.6}, {"ratio": 0.4}], ids=["thresholds", "pop"])
def test_a_format_that_is_named_is_fast(settings, monkeypatch):
    model = tiny("llama", torch.float32)
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    found = {}
    for name, known in {"opaque": (Plain(),), "named": (Plain(), Own())}.items():
        monkeypatch.setattr(formats, "FORMATS", known)
        with same_afterwards(model), prune(model, **settings) as session:
            found[name] = generate(model, prompt())
            backends, reasons = ({getattr(plan, what) for plan in session.plans} for what in ("backend", "reason"))
        if name == "opaque":
            assert backends == {"masked"} and all("Int8Tensor" in reason for reason in reasons)
        else:
            assert backends == {"rows" if "budget" in settings else "inplace"}
    assert torch.equal(found["named"][0], found["opaque"][0])
    torch.testing.assert_close(found["named"][1], found["opaque"][1], rtol=0, atol=1e-4)
