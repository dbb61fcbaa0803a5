"""The invariants of the design, over every dense model type, both backends and every way to decode."""

from itertools import product

import pytest
import torch

from helpers.covering import covers
from helpers.modes import (
    BACKENDS,
    LAYOUTS,
    LENGTH,
    MODES,
    RATIO,
    STEPS,
    dense_run,
    generate,
    greedy_run,
    in_modes,
    in_modes_and_backends,
    in_turn,
    left_padded,
    pruned,
)
from helpers.observe import Active, partitions, prompt
from helpers.reference import Pop, counts, down_projections
from helpers.tiny_models import DENSE_MODELS

# Eager attention adds the smallest float to the scores of padding, which overflows in float64.
NAN_IN_FLOAT64 = {"gemma2", "vaultgemma", "granite_swa", "mpt", "bloom"}


@pytest.fixture(params=DENSE_MODELS)
def any_model(request, load):
    overflows = request.param in NAN_IN_FLOAT64 and "padd" in request.node.name
    return load(request.param, torch.float32 if overflows else torch.float64)


def modes(names=tuple(MODES)):
    """Every layout in these modes, every other type in one of them in turn; each on one backend in turn."""
    cases = in_modes_and_backends(DENSE_MODELS, LAYOUTS, names)
    return pytest.mark.parametrize(("any_model", "mode", "backend"), cases, indirect=["any_model"])


# every layout on both, every other type on one of them in turn; that they are equal is tested with every type
backend_in_turn = pytest.mark.parametrize(
    ("any_model", "backend"), in_turn(DENSE_MODELS, LAYOUTS, BACKENDS), indirect=["any_model"]
)

layouts_on_backends = pytest.mark.parametrize(
    ("any_model", "backend"), list(product(LAYOUTS, BACKENDS)), indirect=["any_model"]
)


@modes()
def test_ratio_0_is_dense_bit_for_bit(any_model, mode, backend):
    tokens, logits = dense_run(mode, any_model)
    with pruned(any_model, backend, ratio=0.0):
        again = MODES[mode][0](any_model)
    assert torch.equal(again[0], tokens)
    assert torch.equal(again[1], logits)


@pytest.mark.parametrize(("any_model", "mode"), list(in_modes(DENSE_MODELS, LAYOUTS)), indirect=["any_model"])
def test_inplace_selects_and_decodes_like_masked(any_model, mode):
    dense_run(mode, any_model)
    found = {}
    for backend in BACKENDS:
        with pruned(any_model, backend), Active(any_model) as seen:
            found[backend] = MODES[mode][0](any_model), seen.seen
    (one, one_seen), (other, other_seen) = found.values()
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=1e-5)  # some norms compute in float32
    for one_ffn, other_ffn in zip(one_seen, other_seen, strict=True):
        assert [a.tolist() for a in one_ffn] == [a.tolist() for a in other_ffn]


@modes([mode for mode, (_, rows) in MODES.items() if rows and mode not in ("greedy", "single")])
def test_every_exact_mode_equals_greedy(any_model, mode, backend):
    rows = MODES[mode][1]
    tokens, logits = dense_run(mode, any_model)
    dense = dense_run("greedy" if rows == 2 else "single", any_model)
    if not (torch.equal(tokens, dense[0]) and torch.allclose(logits, dense[1], rtol=0, atol=1e-5)):
        pytest.skip("transformers: not equal to greedy on the dense model")
    expected = greedy_run(any_model, rows, backend)
    with pruned(any_model, backend):
        found = MODES[mode][0](any_model)
    assert not torch.equal(expected[1], dense[1]), "nothing was pruned: the test sees nothing"
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-5)


@backend_in_turn
def test_greedy_equals_the_reference(any_model, backend):
    check_reference(any_model, backend, "dense", 2)


@covers(model_type=LAYOUTS, prefill=("dense", "partition"), rows=(1, 2), backend=BACKENDS)
def test_every_layout_equals_the_reference_in_every_prefill(load, model_type, prefill, rows, backend):
    check_reference(load(model_type), backend, prefill, rows)


def check_reference(any_model, backend, prefill, rows):
    ids = prompt(rows, LENGTH)
    with Pop(any_model, RATIO, prefill=prefill) as reference:
        expected = reference.greedy(ids, STEPS)
    with pruned(any_model, backend, prefill=prefill) as session, Active(any_model) as seen:
        found = any_model.generate(ids, max_new_tokens=STEPS)
    assert torch.equal(found, expected)
    assert partitions(session) == reference.parts
    assert seen.sets(rows) == reference.active


# that these two hold in the reference is plain, and every type equals it
@layouts_on_backends
def test_every_decode_step_has_exactly_kept_active_channels(any_model, backend):
    with pruned(any_model, backend) as session, Active(any_model) as seen:
        any_model.generate(prompt(2, LENGTH), max_new_tokens=STEPS)
    for ffn, forwards, down in zip(session.report.ffns, seen.seen, down_projections(any_model), strict=True):
        size = max(down.weight.shape[0], down.weight.shape[1])
        retained, candidates, kept = counts(size, RATIO, 0.1)
        sizes = ffn.plan.sizes
        assert (sizes.retained, sizes.candidates, sizes.kept) == (retained, candidates, kept)
        assert len(forwards) == STEPS
        for active in forwards[1:]:  # an activation that vanishes by itself does not count as left out
            assert active.sum(-1).max() <= kept
            assert active.any(0).sum() == kept
        assert ffn.active_per_step == kept


@layouts_on_backends
def test_the_partition_is_disjoint_and_complete(any_model, backend):
    with pruned(any_model, backend) as session:
        any_model.generate(prompt(), max_new_tokens=2)
    for ffn, down in zip(session.report.ffns, down_projections(any_model), strict=True):
        p = ffn.partition
        size = max(down.weight.shape)
        assert torch.cat([p.retained, p.candidates, p.pruned]).sort().values.tolist() == list(range(size))


def test_a_padded_batch_equals_each_row_alone_per_sequence(any_model):
    rows = prompt(2, LENGTH)
    ids, mask = left_padded(rows)
    alone = [generate(any_model, ids[row : row + 1, mask[row].bool()]) for row in range(2)]
    together = generate(any_model, ids, attention_mask=mask)
    if not torch.allclose(together[1], torch.cat([a[1] for a in alone], 1), rtol=0, atol=1e-5):
        pytest.skip("transformers: padding changes the dense model")
    with pruned(any_model, batch="per_sequence"):
        alone = [generate(any_model, ids[row : row + 1, mask[row].bool()]) for row in range(2)]
        together = generate(any_model, ids, attention_mask=mask)
    assert torch.equal(together[0], torch.cat([a[0] for a in alone]))
    torch.testing.assert_close(together[1], torch.cat([a[1] for a in alone], 1), rtol=0, atol=1e-5)


@backend_in_turn
def test_padding_never_changes_the_statistics_of_a_shared_batch(any_model, backend):
    ids, mask = left_padded(prompt(2, LENGTH))
    with Pop(any_model, RATIO) as reference:
        expected = reference.greedy(ids, STEPS, mask=mask)
    with pruned(any_model, backend) as session:
        first = any_model.generate(ids, attention_mask=mask, max_new_tokens=STEPS)
        parts = partitions(session)
        other = any_model.generate(ids.where(mask.bool(), 77), attention_mask=mask, max_new_tokens=STEPS)
    assert torch.equal(first, expected)
    assert parts == reference.parts
    assert torch.equal(other[:, LENGTH:], first[:, LENGTH:])
    assert partitions(session) == parts


def test_float32_in_place_stays_close_to_masked(any_model, load):
    model = load(any_model.config.model_type, torch.float32)
    found = {}
    for backend in BACKENDS:
        with pruned(model, backend), torch.no_grad():
            out = model(prompt(), use_cache=True)
            found[backend] = model(torch.tensor([[5]]), past_key_values=out.past_key_values).logits
    scale = found["masked"].abs().max()
    torch.testing.assert_close(found["inplace"] / scale, found["masked"] / scale, rtol=0, atol=1e-5)
