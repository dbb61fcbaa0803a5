"""Prefill on R and C: the prompt, or a few probe tokens of it, choose the channels that it is completed on."""

import pytest
import torch
from torch import nn

from helpers.covering import covers
from helpers.modes import BACKENDS, LAYOUTS, RATIO, STEPS, backends, fresh, generate, left_padded, pruned
from helpers.observe import InDouble, partitions, prompt, same_afterwards
from helpers.reference import Pop
from helpers.tiny_models import tiny
from helpers.tiny_vlms import image_inputs, tiny_vlm
from pop_mm import ConfigError, PopConfig, prune
from pop_mm import Pop as PopMethod
from pop_mm.adapters import adapter_for

LENGTH = 23
PROBES = (1, 4, 11)


@pytest.fixture
def probed(monkeypatch):
    """How often the in-place backend ran an FFN on probe tokens first."""
    from pop_mm.executors.narrow_ffn import NarrowFFN

    calls, original = [], NarrowFFN._probed_prompt

    def call(self, forward, x):
        calls.append(len(forward.probes))
        return original(self, forward, x)

    monkeypatch.setattr(NarrowFFN, "_probed_prompt", call)
    return calls


@covers(model_type=LAYOUTS, probe_tokens=PROBES, rows=(1, 2), backend=BACKENDS)
def test_greedy_equals_the_reference(model_type, backend, probe_tokens, rows):
    model, ids = fresh(model_type), prompt(rows, LENGTH)
    with Pop(model, RATIO, prefill="partition", probe_tokens=probe_tokens) as reference:
        expected = reference.greedy(ids, STEPS)
    with same_afterwards(model), pruned(model, backend, prefill="partition", probe_tokens=probe_tokens) as session:
        assert torch.equal(model.generate(ids, max_new_tokens=STEPS), expected)
        assert partitions(session) == reference.parts


@pytest.mark.parametrize("probe_tokens", [0, 4])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_the_prompt_runs_on_r_and_c_in_place(model_type, probe_tokens):
    model, ids, found = fresh(model_type), prompt(1, LENGTH), {}
    for backend in BACKENDS:
        with pruned(model, backend, prefill="partition", probe_tokens=probe_tokens) as session, torch.no_grad():
            found[backend] = model(ids).logits, partitions(session)
    assert found["masked"][1] == found["inplace"][1]
    torch.testing.assert_close(found["inplace"][0], found["masked"][0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_pruned_columns_of_down_are_not_computed(probe_tokens, probed):
    model, ids = fresh(), prompt(1, LENGTH)
    widths = []
    with pruned(model, "inplace", prefill="partition", probe_tokens=probe_tokens) as session, torch.no_grad():
        width = session.plans[0].sizes.width

        class Products(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                if func in (torch.mm, torch.addmm, nn.functional.linear):
                    shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
                    widths.append(shapes)
                return func(*args, **(kwargs or {}))

        with Products():
            model(ids)
    narrow = [s for s in widths if s[0] == (LENGTH, width) and s[1][0] == width]
    assert len(narrow) == len(model.model.layers)
    inputs = [s for s in widths if s[1] == (32, width)]
    assert len(inputs) == (2 * len(model.model.layers) if probe_tokens else 0)
    assert probed == [4] * len(model.model.layers) * bool(probe_tokens)


@backends
def test_a_prompt_of_at_most_n_tokens_is_a_plain_partition_prefill(backend, probed):
    model, ids = fresh(), prompt(1, 9)
    runs = []
    for probe_tokens in (0, 9, 64):
        with pruned(model, backend, prefill="partition", probe_tokens=probe_tokens) as session:
            runs.append((*generate(model, ids), partitions(session)))
    for tokens, logits, parts in runs[1:]:
        assert torch.equal(tokens, runs[0][0]) and torch.equal(logits, runs[0][1]) and parts == runs[0][2]
    assert not probed


@backends
@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_padding_changes_nothing(backend, probe_tokens):
    model, rows = fresh(), prompt(2, LENGTH)
    found = []
    for pads in ((0, 0), (7, 7)):
        ids, mask = left_padded(torch.cat([rows[:, :1].expand(-1, pads[0]), rows], 1), pads)
        with pruned(model, backend, prefill="partition", probe_tokens=probe_tokens) as session:
            found.append((*generate(model, ids, attention_mask=mask), partitions(session)))
    (tokens, logits, parts), (padded_tokens, padded_logits, padded_parts) = found
    assert torch.equal(tokens, padded_tokens) and parts == padded_parts
    torch.testing.assert_close(logits, padded_logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_rows_alone_equal_rows_together_per_sequence(probe_tokens):
    model = fresh()
    ids, mask = left_padded(prompt(2, LENGTH), (6, 0))
    with pruned(model, batch="per_sequence", prefill="partition", probe_tokens=probe_tokens) as session:
        together = generate(model, ids, attention_mask=mask)
        parts = partitions(session)
        for row in range(2):
            tokens, logits = generate(model, ids[row : row + 1, mask[row].bool()])
            assert torch.equal(tokens[0], together[0][row])
            torch.testing.assert_close(logits[:, 0], together[1][:, row], rtol=0, atol=1e-9)
            assert partitions(session) == [[ffn[row]] for ffn in parts]


@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_channels_move_once_a_prompt(probe_tokens):
    model = fresh()
    with pruned(model, "inplace", prefill="partition", probe_tokens=probe_tokens) as session, torch.no_grad():
        out = model(prompt(1, LENGTH), use_cache=True)
        moved = session.report.moved_channels
        assert moved > 0
        model(torch.tensor([[5]]), past_key_values=out.past_key_values)
        report = session.report
    assert report.moved_channels == moved
    assert report.timings.masked_forwards == 0
    with pruned(model, "inplace") as session, torch.no_grad():  # the same channels as before the first decode step
        out = model(prompt(1, LENGTH), use_cache=True)
        assert session.report.moved_channels == 0
        model(torch.tensor([[5]]), past_key_values=out.past_key_values)
        assert session.report.moved_channels > 0


@torch.no_grad()
@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_a_prefill_does_not_take_the_place_of_the_prompt_that_decodes(probe_tokens):
    model, token = fresh(), torch.tensor([[5]])
    logits = {}
    settings = {"prefill": "partition", "probe_tokens": probe_tokens}
    for backend in BACKENDS:
        with pruned(model, backend, **settings) as session:
            first, second = (model(prompt(1, LENGTH, seed), use_cache=True).past_key_values for seed in (0, 1))
            steps = [model(token, past_key_values=first).logits]
            third = model(prompt(1, LENGTH, 2), use_cache=True).past_key_values
            for cache in (first, second, second, third, first):
                steps.append(model(token, past_key_values=cache).logits)
            logits[backend] = torch.cat(steps)
            masked = session.report.timings.masked_forwards
        assert masked == (1 if backend == "inplace" else 0)  # the last: the third prompt is alive and has decoded
    torch.testing.assert_close(logits["inplace"], logits["masked"], rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_a_second_turn_ranks_again(probe_tokens):
    model, found = fresh(), {}
    for backend in BACKENDS:
        with pruned(model, backend, prefill="partition", probe_tokens=probe_tokens) as session:
            cache = model(prompt(1, LENGTH), use_cache=True).past_key_values
            model(torch.tensor([[5]]), past_key_values=cache)
            first = partitions(session)
            model(prompt(1, LENGTH, 1), past_key_values=cache)
            found[backend] = model(torch.tensor([[6]]), past_key_values=cache).logits
            if backend == "masked":
                expected = partitions(session)
            assert partitions(session) == expected != first
    torch.testing.assert_close(found["inplace"], found["masked"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("probe_tokens", [0, 4])
def test_a_graph_of_the_prefill_stays_good(probe_tokens):
    model, ids, found = fresh(), prompt(1, LENGTH), {}
    for backend in BACKENDS:
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        with pruned(model, backend, prefill="partition", probe_tokens=probe_tokens):
            model(inputs_embeds=embeds).logits.sum().backward()
        found[backend] = embeds.grad
    torch.testing.assert_close(found["inplace"], found["masked"], rtol=0, atol=1e-9)


def test_a_hook_on_a_projection_sees_all_tokens():
    model, seen = fresh(), []
    with pruned(model, "inplace", prefill="partition", probe_tokens=4), torch.no_grad():
        handle = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, out: seen.append(out.shape))
        model(prompt(1, LENGTH))
        handle.remove()
    assert seen == [(1, LENGTH, 64)]


@backends
def test_one_forward_equals_steps(backend):
    model, ids = fresh(), prompt(1, LENGTH + 6)
    with pruned(model, backend, prefill="partition", probe_tokens=4) as session, torch.no_grad():
        with session.split(LENGTH):
            together = model(ids).logits[:, LENGTH:]
        out = model(ids[:, :LENGTH], use_cache=True)
        steps = [model(ids[:, [i]], past_key_values=out.past_key_values).logits for i in range(LENGTH, LENGTH + 6)]
    torch.testing.assert_close(torch.cat(steps, 1), together, rtol=0, atol=1e-9)


@backends
@pytest.mark.parametrize("weights", [{}, {"text": 0.0}, {"image": 0.0}])
@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava"])
def test_probes_are_tokens_of_modalities_that_count(model_type, weights, backend):
    model = tiny_vlm(model_type, torch.float64)
    inputs = image_inputs(model_type, model, images=[2, 1], text_len=[9, 5])
    config = PopConfig(
        RATIO,
        scope="ffn",
        backend=backend,
        method=PopMethod(prefill="partition", probe_tokens=3),
        modality_weights=weights,
        kernels="stock",
    )
    image = inputs["input_ids"] == adapter_for(model).modality_token_ids(model)["image"]
    counted = inputs["attention_mask"].bool() & (image if weights.get("text") == 0 else ~image if weights else True)
    chosen = []
    for row, of_row in enumerate(counted):
        columns = of_row.nonzero().flatten().tolist()
        chosen += [(row, columns[-(-part * len(columns) // 3) - 1]) for part in (1, 2, 3)]
    first = []
    with InDouble(), prune(model, config) as session, torch.no_grad():
        down = session.plans[0].ffn.down.module
        handle = down.register_forward_pre_hook(lambda _, args: first.append(args[0]))
        model(**inputs)
        handle.remove()
        ffn = session.report.ffns[0]
    h = first[0].view(*counted.shape, -1)  # of the first FFN: in the original order, and nothing was pruned before it
    energy = sum(h[row, column].double() ** 2 for row, column in chosen)
    scores = down.weight.detach().double().norm(dim=0) * energy.sqrt()
    ranking = scores.argsort(descending=True, stable=True)
    assert set(ffn.partition.retained.tolist()) == set(ranking[: ffn.plan.sizes.retained].tolist())
    with InDouble(), prune(model, config) as session, torch.no_grad():  # without a hook gate and up are narrow too
        model(**inputs)
        assert torch.equal(session.report.ffns[0].partition.retained, ffn.partition.retained)


def test_experts_refuse_probe_tokens():
    with pytest.raises(ConfigError, match=r"probe_tokens=4 .*experts.*prefill='partition' without probe_tokens"):
        prune(tiny("mixtral"), PopConfig(0.4, method=PopMethod(prefill="partition", probe_tokens=4)))
