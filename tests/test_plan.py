"""What a session would do with each FFN, asked of a model with and without its weights."""

import pytest
import torch

from helpers.tiny_models import DENSE_MODELS, tiny
from pop_mm import AdapterError, PopConfig, SessionError, prune
from pop_mm.adapters import adapter_for
from pop_mm.session.session import plan_ffns

CONFIG = PopConfig(0.4, scope="ffn")


def rows(model):
    return [plan.to_dict() for plan in plan_ffns(model, CONFIG)]


def on_meta(model_type, **settings):
    with torch.device("meta"):
        return tiny(model_type, **settings)


@pytest.mark.parametrize("model_type", DENSE_MODELS)
def test_a_model_without_weights_is_planned_as_with_them(model_type):
    planned = rows(on_meta(model_type))
    assert planned == rows(tiny(model_type))
    assert {row["backend"] for row in planned} == {"inplace"}


def test_an_unregistered_type_cannot_be_probed_without_weights():
    model = on_meta("llama")
    model.config.model_type = "brand_new"
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp cannot be probed: .*meta device.* Load the model"):
        adapter_for(model)


@pytest.mark.parametrize("settings", [{}, {"backend": "masked"}, {"backend": "inplace"}])
def test_a_model_without_weights_is_planned_but_not_attached(settings):
    session = prune(on_meta("llama"), ratio=0.4, **settings)
    with pytest.raises(SessionError, match=r"meta device.*load"):
        session.attach()
    assert not session.attached


def test_an_offloaded_ffn_is_planned_masked():
    from accelerate import cpu_offload

    model = cpu_offload(tiny("llama"))
    plans = plan_ffns(model, CONFIG)
    assert {plan.backend for plan in plans} == {"masked"}
    assert all("gate_proj is offloaded" in plan.reason for plan in plans)
