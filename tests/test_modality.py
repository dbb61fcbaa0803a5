"""Statistics by modality, against the obvious computation; and what decides which positions are images."""

import math
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from helpers.modes import config_of
from helpers.observe import InDouble
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs, tiny_vlm, video_inputs
from pop_mm import ConfigError, PhaseError, PopConfig, prune
from pop_mm.adapters import adapter_for
from pop_mm.modality import MODALITIES, positions_of

TYPES = ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3", "smolvlm", "phi4_multimodal"]
RATIO = 0.4


@cache
def vlm(model_type):
    return tiny_vlm(model_type, torch.float64)


def session_of(model, backend="masked", **settings):
    return prune(model, config_of(**{"ratio": RATIO, "scope": "ffn", "gamma": 0.2, "backend": backend, **settings}))


def generate(model, prompt, steps=4, **settings):
    out = model.generate(
        **prompt, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True, **settings
    )
    return out.sequences[:, prompt["input_ids"].shape[1] :], torch.stack(out.logits)


@contextmanager
def downs_seen(session):
    """What enters each dense down projection in the next forwards: a list of [B, q, D] for each."""
    seen, hooks = [], []
    for ffn in session.report.ffns:
        mine = []
        hook = ffn.plan.ffn.down.module.register_forward_pre_hook(lambda _, args, mine=mine: mine.append(args[0]))
        seen.append(mine)
        hooks.append(hook)
    yield seen
    for hook in hooks:
        hook.remove()


def expected_partition(plan, h, counted):
    """R and C as sets of channels, the slow way: h is [tokens, D], counted the weight of each token's squares."""
    norms = plan.ffn.down.module.weight.detach().double().norm(dim=0)
    energy = sum(weight * token.double() ** 2 for weight, token in zip(counted, h, strict=True))
    ranking = sorted(range(len(norms)), key=lambda i: (-float(norms[i] * energy[i].sqrt()), i))
    sizes = plan.sizes
    return set(ranking[: sizes.retained]), set(ranking[sizes.retained : sizes.width])


def parts(partition):
    return set(partition.retained.tolist()), set(partition.candidates.tolist())


@pytest.mark.parametrize("weights", [{}, {"image": 0.0}, {"text": 0.0}, {"image": 0.25, "text": 4.0}])
@pytest.mark.parametrize("model_type", TYPES)
def test_partitions_are_those_of_the_weighted_tokens(model_type, weights):
    model = vlm(model_type)
    prompt = image_inputs(model_type, model, images=[2, 1], text_len=[9, 5])
    ids, valid = prompt["input_ids"], prompt["attention_mask"].bool()
    with InDouble(), session_of(model, modality_weights=weights) as session:
        image = ids == adapter_for(model).modality_token_ids(model)["image"]
        with downs_seen(session) as seen, torch.no_grad():
            model(**prompt)
        report = session.report
    factor = torch.where(image, weights.get("image", 1.0), weights.get("text", 1.0))[valid].tolist()
    assert report.modality_tokens == {"text": int((valid & ~image).sum()), "image": int((valid & image).sum())}
    for ffn, ((h,)) in zip(report.ffns, seen, strict=True):
        tokens = h.view(*ids.shape, -1)[valid]
        assert parts(ffn.partition) == expected_partition(ffn.plan, tokens, factor)
        for name, mask in ("image", image), ("text", ~image):
            assert parts(ffn.alone[name]) == expected_partition(ffn.plan, tokens, mask[valid].double().tolist())
            chosen = set().union(*parts(ffn.partition))
            shared = len(chosen & set().union(*parts(ffn.alone[name])))
            assert math.isclose(ffn.modality_overlap[name], shared / len(chosen), rel_tol=1e-6)


@pytest.mark.parametrize("backend", ["masked", "inplace"])
@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava", "qwen3_vl_moe"])
def test_one_row_at_a_time_is_the_batch(model_type, backend):
    """Images of different sizes and numbers, per sequence: each row as if it were alone (masked); and shared ones decode."""
    model = tiny_vlm(model_type, torch.float64)
    both = image_inputs(model_type, model, images=[1, 2], text_len=[7, 4])
    if backend == "inplace":
        with session_of(model, backend) as session:
            generate(model, both)
        assert set(session.report.modality_tokens) == {"text", "image"}
        return
    with InDouble(), session_of(model, batch="per_sequence", modality_weights={"image": 0.5}) as session:
        tokens, logits = generate(model, both)
        together = [ffn.partition for ffn in session.report.ffns]
    alone = image_inputs(model_type, model, images=[1, 2], text_len=[7, 4])
    for row in range(2):
        valid = both["attention_mask"][row].bool()
        single = {
            name: value[row : row + 1, valid] if value.shape == both["input_ids"].shape else value
            for name, value in alone.items()
        }
        single = _media_of_row(single, both, row)
        with InDouble(), session_of(model, batch="per_sequence", modality_weights={"image": 0.5}) as session:
            found, mine = generate(model, single)
            for ffn, part in zip(session.report.ffns, together, strict=True):
                if ffn.experts is not None:
                    count = len(ffn.experts.prompt_tokens)
                    got = [t > 0 for t in ffn.experts.prompt_tokens]
                    ours = part.retained.view(2, count, -1)[row][got]
                    assert torch.equal(ours, ffn.partition.retained[got])
                else:
                    assert torch.equal(part.retained[row], ffn.partition.retained[0])
        assert torch.equal(found[0], tokens[row])
        torch.testing.assert_close(mine[:, 0], logits[:, row], rtol=0, atol=1e-9)


def _media_of_row(single, both, row):
    """Row 0 has the first image, row 1 the other two."""
    if "image_grid_thw" in single:
        patches = single["image_grid_thw"].prod(-1)
        cut = int(patches[0])
        pixels, grid = single["pixel_values"], single["image_grid_thw"]
        chosen = (pixels[:cut], grid[:1]) if row == 0 else (pixels[cut:], grid[1:])
        return {**single, "pixel_values": chosen[0], "image_grid_thw": chosen[1]}
    return {**single, "pixel_values": single["pixel_values"][:1] if row == 0 else single["pixel_values"][1:]}


@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava"])
def test_a_chunked_prefill_is_the_whole_one(model_type):
    model = vlm(model_type)
    prompt = image_inputs(model_type, model, text_len=11)
    found = []
    for more in {}, {"prefill_chunk_size": 5}:
        try:
            with InDouble(), session_of(model) as session:
                tokens, _ = generate(model, prompt, **more)
        except (ValueError, IndexError, RuntimeError) as error:
            if more and not isinstance(error, PhaseError):
                pytest.skip(f"transformers cannot split the prefill of {model_type}: {error}")
            raise
        found.append((tokens, session.report.modality_tokens, [parts(f.partition) for f in session.report.ffns]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl", "llava"])
def test_a_second_question_on_the_same_cache_adds_to_the_first(model_type):
    model = vlm(model_type)
    first = image_inputs(model_type, model)
    with session_of(model) as session:
        out = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        before = session.report.modality_tokens
        more = torch.full((1, 4), 7)
        ids = torch.cat([out.sequences, more], 1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in first:
            types = first["mm_token_type_ids"]
            second["mm_token_type_ids"] = torch.cat([types, types.new_zeros(1, ids.shape[1] - types.shape[1])], 1)
        model.generate(**second, past_key_values=out.past_key_values, max_new_tokens=3, do_sample=False)
        after = session.report.modality_tokens
    assert after["image"] == before["image"] > 0
    assert after["text"] == before["text"] + 5, "the last generated token was in no cache, and four more came"


def test_experts_keep_statistics_by_modality():
    model = tiny_vlm("qwen3_vl_moe", torch.float64)
    prompt = image_inputs("qwen3_vl_moe", model, images=2, text_len=12)
    chosen = {}
    for name, weights in ("both", {}), ("image", {"text": 0.0, "video": 0.0}), ("text", {"image": 0.0}):
        with InDouble(), session_of(model, modality_weights=weights) as session, torch.no_grad():
            model(**prompt)
            chosen[name] = session.report.ffns
    for both, image, text in zip(*chosen.values(), strict=True):
        assert both.experts is not None
        for name, other in ("image", image), ("text", text):
            for expert in other.experts.partitioned:
                mine, theirs = both.alone[name], other.partition
                assert torch.equal(mine.retained[expert], theirs.retained[expert])
                assert torch.equal(mine.candidates[expert], theirs.candidates[expert])
        assert set(image.experts.partitioned) | set(text.experts.partitioned) == set(both.experts.partitioned)
        assert image.experts.prompt_tokens == both.experts.prompt_tokens, "the router sends them all the same"


def test_a_prompt_without_images_is_text_alone():
    model = vlm("qwen3_vl")
    with session_of(model) as session:
        generate(model, image_inputs("qwen3_vl", model, images=0))
    assert set(session.report.modality_tokens) == {"text"}
    assert all(not ffn.alone and not ffn.modality_overlap for ffn in session.report.ffns)


def test_a_partition_by_the_image_differs_from_one_by_the_text():
    model = vlm("qwen3_vl")
    with session_of(model) as session:
        generate(model, image_inputs("qwen3_vl", model))
    assert any(parts(f.alone["image"]) != parts(f.alone["text"]) for f in session.report.ffns)
    assert any(f.modality_overlap["text"] < 1 for f in session.report.ffns)


# which positions are what -------------------------------------------------------------------------------------------


def test_videos_have_statistics_of_their_own():
    model = vlm("qwen3_vl")
    prompt = video_inputs("qwen3_vl", model)
    with session_of(model) as session, torch.no_grad():
        model(**prompt)
    ids = adapter_for(model).modality_token_ids(model)
    assert session.report.modality_tokens["video"] == int((prompt["input_ids"] == ids["video"]).sum()) > 0
    assert "image" not in session.report.modality_tokens


def test_marks_of_the_processor_come_before_ids():
    ids = torch.tensor([[5, 9, 9, 6]])
    marks = torch.tensor([[0, 2, 2, 0]])  # GLM's frames stand under the image's id
    found = positions_of({"input_ids": ids, "mm_token_type_ids": marks}, {"image": 9}, 0)
    assert found.modality.tolist() == marks.tolist() and found.present == (0, 2)
    assert positions_of({"input_ids": ids}, {"image": 9}, 0).modality.tolist() == [[0, 1, 1, 0]]


def test_marks_of_the_whole_prompt_are_cut_to_the_forward():
    marks = torch.tensor([[0, 1, 1, 0, 0, 1]])
    found = positions_of({"input_ids": torch.zeros(1, 2).long(), "mm_token_type_ids": marks}, {"image": 9}, 4)
    assert found.modality.tolist() == [[0, 1]]


@pytest.mark.parametrize("marks", [torch.zeros(1, 3).long(), torch.zeros(2, 2).long(), torch.zeros(2)])
def test_marks_that_do_not_fit_are_left_to_the_ids(marks):
    found = positions_of({"input_ids": torch.tensor([[9, 1, 1, 9]]), "mm_token_type_ids": marks}, {"image": 9}, 0)
    assert found.modality.tolist() == [[1, 0, 0, 1]]


def test_sounds_and_embeddings_count_as_text():
    assert positions_of({"inputs_embeds": torch.zeros(1, 4, 8)}, {"image": 9}, 0) is None
    embedded = {"inputs_embeds": torch.zeros(1, 4, 8), "mm_token_type_ids": torch.tensor([[0, 3, 1, 0]])}
    assert positions_of(embedded, {"image": 9}, 0).modality.tolist() == [[0, 0, 1, 0]]
    assert positions_of({"input_ids": torch.tensor([[9]])}, {}, 0) is None


# bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"sound": 1}, "a modality is one of text, image, video; got 'sound'"),
        ({"image": -1}, r"modality_weights\['image'\] must be a number from 0; got -1"),
        ({"image": float("nan")}, "must be a number from 0"),
        ({"image": True}, "must be a number from 0"),
        ([1, 2], "must map modalities to numbers"),
        (dict.fromkeys(MODALITIES, 0), "all 0"),
    ],
)
def test_weights_that_make_no_sense(weights, message):
    with pytest.raises(ConfigError, match=message):
        PopConfig(0.4, modality_weights=weights)


def test_a_text_model_has_no_modalities():
    with pytest.raises(ConfigError, match="takes text alone"):
        prune(tiny("llama"), ratio=0.4, modality_weights={"image": 2})


def test_a_prompt_without_anything_that_counts():
    model = vlm("qwen3_vl")
    with (
        session_of(model, modality_weights={"text": 0}),
        pytest.raises(PhaseError, match="no token of a modality that counts"),
    ):
        generate(model, image_inputs("qwen3_vl", model, images=0))


# every mode of generate ---------------------------------------------------------------------------------------------

MODES = {
    "beams": {"num_beams": 3},
    "several answers": {"num_return_sequences": 2, "num_beams": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "contrast penalty": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_5_vl", "llava", "gemma3", "smolvlm"])
def test_images_are_seen_in_every_mode(model_type, mode):
    model = vlm(model_type)
    prompt = image_inputs(model_type, model, images=2)
    marks = list(adapter_for(model).modality_token_ids(model).values())  # random models may well say them
    settings = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": marks, **MODES[mode]}
    dense = model.generate(**prompt, **settings)
    found = {}
    for backend in ("masked", "inplace"):
        with InDouble(), session_of(model, backend) as session:
            found[backend] = model.generate(**prompt, **settings)
        report = session.report
        with InDouble(), session_of(model) as plain, torch.no_grad():
            model(**prompt)
        once = plain.report
        rows = settings.get("num_beams", 1)
        assert report.modality_tokens == {name: rows * count for name, count in once.modality_tokens.items()}
        for ffn, other in zip(report.ffns, once.ffns, strict=True):
            assert parts(ffn.partition) == parts(other.partition)
            assert parts(ffn.alone["image"]) == parts(other.alone["image"])
    assert torch.equal(found["masked"], found["inplace"])
    assert found["masked"].shape[0] == dense.shape[0]


def test_paligemmas_marks_of_prefix_and_suffix_are_no_images():
    ids = torch.tensor([[9, 9, 5, 6]])
    found = positions_of({"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}, {"image": 9}, 0)
    assert found.modality.tolist() == [[1, 1, 0, 0]]


def test_rows_without_an_image_say_nothing_of_its_choice():
    model = vlm("qwen3_vl")
    with session_of(model, batch="per_sequence") as session:
        generate(model, image_inputs("qwen3_vl", model, images=[2, 0]))
    report = session.report
    for ffn in report.ffns:
        assert ffn.reached["image"].tolist() == [True, False]
        alone, chosen = ffn.alone["image"].allowed()[0], ffn.partition.allowed()[0]
        assert math.isclose(
            ffn.modality_overlap["image"], float((alone & chosen).sum()) / ffn.plan.sizes.width, rel_tol=1e-6
        )


def test_an_image_behind_the_context_is_not_in_the_prompt():
    model = vlm("qwen3_vl")
    prompt = image_inputs("qwen3_vl", model)
    first = int((prompt["input_ids"][0] == adapter_for(model).modality_token_ids(model)["image"]).nonzero()[0])
    with session_of(model) as session, session.split(first), torch.no_grad():
        model(**prompt)
    assert session.report.modality_tokens == {"text": first}
    assert all(not ffn.modality_overlap for ffn in session.report.ffns)
