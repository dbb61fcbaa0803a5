"""Thresholds from the prompt of a vision-language model: text tokens set them, or all where there is too little text."""

import pytest
import torch
from test_thresholds import shares

from helpers.observe import differences, fingerprint
from helpers.reference_thresholds import FEWEST, Thresholds
from helpers.tiny_vlms import VLM_MODELS, image_inputs, tiny_vlm
from pop_mm import prune


def kinds(model, ids):
    """[B, q]: 0 for text, 1 where an image's features stand."""
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    return (ids == token).long() if token is not None and model.config.model_type != "mllama" else torch.zeros_like(ids)


def generate(model, inputs, steps=3):
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack([logits.double() for logits in out.logits])


@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_the_thresholds_are_those_of_the_text(model_type, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # where all columns fit
    model = tiny_vlm(model_type, torch.float64)
    inputs = image_inputs(model_type, model, images=[1])
    ids = inputs["input_ids"]
    modality = kinds(model, ids)
    assert modality.any() and (modality == 0).sum() >= FEWEST
    with prune(model, budget=0.6) as session:
        generate(model, inputs)
        report = session.report
    own = shares(session)
    tower = model.model.language_model
    with Thresholds(tower, own["x"], own["h"]) as reference, torch.no_grad():
        reference.phase, (reference.rows, reference.length) = "prefill", ids.shape
        reference.valid, reference.kinds = torch.ones_like(ids).tolist(), modality.tolist()
        reference.tokens, reference.firsts = modality.tolist(), {0: 0}
        model(**inputs)
        found = {
            name: reference._threshold(name, 0, own["h" if "down" in name else "x"]) for name, _ in reference.entries
        }
    assert sorted({inputs.thresholds[0] for inputs in report.inputs}) == sorted(set(found.values()))
    assert {"text", "image"} == set(report.inputs[0].prompt_share)
    assert report.threshold_tokens == {"text": int((modality == 0).sum()) - 1}
    for inputs in report.inputs:
        assert abs(inputs.prompt_share["text"] - inputs.share) < 2e-3
    assert "of prompt's image" in " ".join(str(report).split())


def test_all_tokens_set_them_where_there_is_too_little_text():
    model = tiny_vlm("llava", torch.float64)
    inputs = image_inputs("llava", model, images=[1])
    ids = inputs["input_ids"]
    image = kinds(model, ids)[0].bool()
    keep = image.clone()
    keep[(~image).nonzero().flatten()[: FEWEST - 1]] = True  # the image and three words
    inputs["input_ids"], inputs["attention_mask"] = ids[:, keep], torch.ones_like(ids[:, keep])
    with prune(model, budget=0.6) as session:
        generate(model, inputs)
    assert session.report.threshold_tokens == {"text": FEWEST - 2, "image": int(image.sum())}
    for found in session.report.inputs:
        share = (found.prompt_share["text"] * (FEWEST - 2) + found.prompt_share["image"] * int(image.sum())) / int(
            keep.sum() - 1
        )
        assert abs(share - found.share) < 2e-3


@pytest.mark.parametrize("model_type", VLM_MODELS)
def test_every_type_is_masked_and_restored(model_type):
    model = tiny_vlm(model_type, torch.float32)
    inputs = image_inputs(model_type, model, images=[1])
    dense = generate(model, inputs)
    before = fingerprint(model)
    with prune(model, budget=0.8) as session:
        found = generate(model, inputs)
    changed = differences(before, fingerprint(model))
    assert [key for key in changed if "rope_deltas" not in key] == []  # which generate itself sets
    # the prefill is dense; the compiled library may round its norms otherwise
    torch.testing.assert_close(found[1][0], dense[1][0], rtol=0, atol=2e-5)
    with prune(model, budget=0.8, backend="masked"):
        assert torch.equal(generate(model, inputs, steps=1)[1][0], dense[1][0])
    assert not torch.allclose(found[1][1:], dense[1][1:])
    tower = session._adapter.find_tower(model)[0]
    assert all(plan.record.name.startswith(tower) for plan in session.plans)
    for one in session.report.inputs:
        assert one.kept is not None and 0 < one.kept <= 1
