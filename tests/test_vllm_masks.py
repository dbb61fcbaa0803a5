"""What the vLLM plug-in decides, without vLLM: tokens of a forward, statistics by KV block, masks, ranks, plans."""

import re
import threading
from types import SimpleNamespace

import pytest
import torch

from helpers.tiny_models import tiny
from helpers.vllm_inputs import WIDTH, channels, entries, forward, values
from pop_mm import PopConfig
from pop_mm.engines.vllm.planned import plan_inputs
from pop_mm.engines.vllm.rows import ChosenRows, Room
from pop_mm.engines.vllm.running import Running
from pop_mm.engines.vllm.settings import check_engine, settings_of
from pop_mm.engines.vllm.shard import Shard
from pop_mm.errors import AdapterError, ConfigError, EngineError
from pop_mm.methods.thresholds import PASS_ALL, histogram, quantile
from pop_mm.ops.library import library
from pop_mm.partition import partition
from pop_mm.session.planning import plan_ffns


def test_tokens_of_chunks_and_decode_steps_in_one_forward():
    found = forward(("a", 3, 2, 9, [5, 1, 2]), ("b", 1, 6, 6, [3, 4]), ("c", 4, 0, 2, [6]))
    assert [(p.block, p.start, p.stop, p.fresh, p.begins) for p in found.parts] == [
        (5, 0, 2, False, False),
        (1, 2, 3, True, False),
        (6, 4, 6, True, True),
    ]
    assert [(p.request, p.length, p.blocks.tolist()) for p in found.decoding] == [("b", 6, [3, 4]), ("c", 2, [6])]
    assert found.rows.tolist() == [3, 6, 7]
    assert found.row.tolist() == [0, 1, 1] and found.position.tolist() == [6, 2, 3]


def test_a_prompt_in_chunks_has_the_statistics_of_a_whole_one():
    prompt, step = values(7), values(1, 1)
    for make in channels, entries:
        whole, chunked = make(), make()
        whole.leave_out(prompt, forward(("a", 7, 0, 7, [0, 1])))
        for start, stop in (0, 3), (3, 5), (5, 7):
            chunked.leave_out(prompt[start:stop], forward(("a", stop - start, start, 7, [4, 2])))
        first = whole.leave_out(step, forward(("a", 1, 7, 7, [0, 1])))
        second = chunked.leave_out(step, forward(("a", 1, 7, 7, [4, 2])))
        assert torch.equal(first, second) and bool((first == 0).any())


def test_pop_keeps_what_the_paper_says():
    prompt, step, weight = values(7), values(1, 1), torch.rand(WIDTH) + 0.5
    found = channels(weight=weight)
    found.leave_out(prompt, forward(("a", 7, 0, 7, [0, 1])))
    masked = found.leave_out(step, forward(("a", 1, 7, 7, [0, 1])))
    part = partition(
        weight * torch.stack([prompt[:4].square().sum(0), prompt[4:].square().sum(0)]).sum(0).sqrt(), found.sizes
    )
    candidates = (step[0] * weight).abs()[part.candidates]
    best = part.candidates[candidates.topk(found.sizes.candidates_kept).indices]
    assert sorted(masked[0].nonzero().squeeze(1).tolist()) == sorted([*part.retained.tolist(), *best.tolist()])


def test_thresholds_keep_what_is_above_the_quantile_without_the_first_token():
    prompt, step = values(7), values(3, 1)
    prompt[0] *= 100
    found = entries(0.4)
    found.leave_out(prompt, forward(("a", 7, 0, 7, [0, 1])))
    masked = found.leave_out(step, forward(("a", 3, 7, 7, [0, 1])))
    limit = quantile(histogram(prompt[1:], torch.ones(1, 6, dtype=torch.bool))[0], 0.4)
    assert torch.equal(masked, step.where(step.abs() > limit, 0))


def test_a_prefix_brings_its_statistics_and_a_block_given_away_takes_its_own():
    prompt = values(8)
    for make in channels, entries:
        alone, found, step = make(), make(), values(1, 2)
        alone.leave_out(prompt, forward(("a", 8, 0, 8, [0, 1])))
        found.leave_out(values(8, 9), forward(("old", 8, 0, 8, [3, 1])))  # what blocks 3 and 1 held before
        found.leave_out(prompt[:4], forward(("first", 4, 0, 4, [3])))
        found.leave_out(prompt[4:], forward(("a", 4, 4, 8, [3, 1])))  # its first block was in the cache
        assert torch.equal(
            alone.leave_out(step, forward(("a", 1, 8, 8, [0, 1]))),
            found.leave_out(step, forward(("a", 1, 8, 8, [3, 1]))),
        )


def test_requests_do_not_influence_each_other():
    for make in channels, entries:
        together, alone = make(), {"a": make(), "b": make()}
        prompts, steps = {"a": values(5), "b": values(6, 1)}, {"a": values(1, 2), "b": values(1, 3)}
        both = forward(("a", 5, 0, 5, [0, 1]), ("b", 6, 0, 6, [2, 3]))
        together.leave_out(torch.cat([*prompts.values()]), both)
        found = together.leave_out(
            torch.cat([*steps.values()]), forward(("a", 1, 5, 5, [0, 1]), ("b", 1, 6, 6, [2, 3]))
        )
        for row, (name, length) in enumerate({"a": 5, "b": 6}.items()):
            alone[name].leave_out(prompts[name], forward((name, length, 0, length, [4, 5])))
            own = alone[name].leave_out(steps[name], forward((name, 1, length, length, [4, 5])))
            assert torch.equal(found[row : row + 1], own)


def test_a_preempted_request_is_computed_again_with_the_same_choices():
    prompt, steps = values(5), values(3, 1)
    for make in channels, entries:
        found = make()
        found.leave_out(prompt, forward(("a", 5, 0, 5, [0, 1])))
        before = torch.cat([found.leave_out(steps[i : i + 1], forward(("a", 1, 5 + i, 5, [0, 1]))) for i in range(3)])
        again = found.leave_out(torch.cat([prompt, steps]), forward(("a", 8, 0, 5, [6, 7])))
        assert torch.equal(again[:5], prompt) and torch.equal(again[5:], before)
        fresh = make()  # and where it was preempted before its first decode step
        again = fresh.leave_out(torch.cat([prompt, steps]), forward(("b", 8, 0, 5, [6, 7])))
        assert torch.equal(again[5:], before)


def test_padding_is_passed_through_and_not_counted():
    for make in channels, entries:
        found, plain = make(), make()
        found.leave_out(torch.cat([values(5), values(3, 7)]), forward(("a", 5, 0, 5, [0, 1])))
        plain.leave_out(values(5), forward(("a", 5, 0, 5, [0, 1])))
        step = torch.cat([values(1, 1), torch.full((2, WIDTH), torch.nan)])
        padded = found.leave_out(step, forward(("a", 1, 5, 5, [0, 1])))
        assert torch.equal(padded[:1], plain.leave_out(step[:1], forward(("a", 1, 5, 5, [0, 1]))))
        assert bool(padded[1:].isnan().all())


def test_a_request_whose_prompt_goes_on_is_decided_again_and_ids_may_be_used_twice():
    for make in channels, entries:
        found, other = make(), make()
        found.leave_out(values(5), forward(("a", 5, 0, 5, [0, 1])))
        found.leave_out(values(1, 1), forward(("a", 1, 5, 5, [0, 1])))
        longer = torch.cat([values(5), values(3, 4)])
        found.leave_out(longer[5:], forward(("a", 3, 5, 8, [0, 1])))
        other.leave_out(longer, forward(("b", 8, 0, 8, [2, 3])))
        step = values(1, 5)
        second = found.leave_out(step, forward(("a", 1, 8, 8, [0, 1])))
        assert torch.equal(second, other.leave_out(step, forward(("b", 1, 8, 8, [2, 3]))))
        found.forget("a")
        found.leave_out(9 * values(8, 6), forward(("a", 8, 0, 8, [0, 1])))
        assert not torch.equal(second, found.leave_out(step, forward(("a", 1, 8, 8, [0, 1]))))


def test_a_prompt_that_is_not_finite_decodes_dense_and_leaves_others_alone():
    for make in channels, entries:
        complaints = []
        found, step = make(complaints=complaints), values(2, 1)
        bad = values(5)
        bad[3, 2] = torch.nan
        found.leave_out(torch.cat([bad, values(5, 2)]), forward(("bad", 5, 0, 5, [0, 1]), ("good", 5, 0, 5, [2, 3])))
        masked = found.leave_out(step, forward(("bad", 1, 5, 5, [0, 1]), ("good", 1, 5, 5, [2, 3])))
        assert torch.equal(masked[0], step[0]) and bool((masked[1] == 0).any())
        assert len(complaints) == 1 and "NaN or infinite in the prompt of request bad" in complaints[0]


def test_a_prompt_too_short_for_thresholds_decodes_dense():
    found, step = entries(), values(1, 1)
    found.leave_out(values(3), forward(("a", 3, 0, 3, [0])))
    assert torch.equal(found.leave_out(step, forward(("a", 1, 3, 3, [0]))), step)
    assert found._for(forward(("a", 1, 3, 3, [0])).decoding[0]).item() == PASS_ALL


@pytest.mark.parametrize("method", ["pop", "static", "full", "thresholds"])
def test_every_rank_chooses_as_one_process(method):
    ranks, prompt, step, weight = 3, values(6), values(4, 1), torch.rand(WIDTH) + 0.5
    tokens = forward(("a", 6, 0, 6, [0, 1]))
    steps = forward(("a", 2, 6, 6, [0, 1]), ("a", 2, 6, 6, [0, 1]))
    make = (lambda **kw: entries(weight=kw.pop("weight"), **kw)) if method == "thresholds" else None
    make = make or (lambda **kw: channels(method, **kw))
    one = make(weight=weight)
    one.leave_out(prompt, tokens)
    wanted = one.leave_out(step, steps)
    barrier, shared, found = threading.Barrier(ranks), [None] * ranks, [None] * ranks

    def work(rank):
        def exchange(tensor):
            shared[rank] = tensor.clone()
            barrier.wait()
            copies = list(shared)
            barrier.wait()
            return copies

        width = WIDTH // ranks
        own = slice(rank * width, (rank + 1) * width)
        shard = Shard(own.start, width, WIDTH, lambda t: torch.cat(exchange(t), -1), lambda t: sum(exchange(t)))
        mine = make(weight=weight[own], shard=shard)
        mine.leave_out(prompt[:, own], tokens)
        found[rank] = mine.leave_out(step[:, own], steps)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert torch.equal(torch.cat(found, 1), wanted) and bool((wanted == 0).any())


def test_statistics_bytes_of_a_block():
    assert channels().block_bytes == 4 * WIDTH and entries().block_bytes == 4 * 4096


def test_plans_are_those_of_a_session():
    model = tiny("llama")
    config = PopConfig(ratio=0.4, batch="per_sequence")
    planned, plans = plan_inputs(model.config, config), plan_ffns(model, config)
    assert [found.modules for found in planned.inputs] == [(f"{plan.ffn.name}.down_proj",) for plan in plans]
    assert [found.sizes for found in planned.inputs] == [plan.sizes for plan in plans]
    assert planned.pruned_ffns == len(planned.ffns) == model.config.num_hidden_layers


def test_plans_of_thresholds_have_attention_too():
    planned = plan_inputs(tiny("llama").config, PopConfig(budget=0.65))
    layer = [found for found in planned.inputs if ".0." in found.record]
    assert {(found.which, len(found.modules)) for found in layer} == {("x", 3), ("x", 1), ("x", 2), ("h", 1)}
    narrow = plan_inputs(tiny("llama").config, PopConfig(budget=0.65, scope="ffn"))
    assert all(".mlp" in found.record for found in narrow.inputs)


def test_dense_settings_plan_nothing():
    for config in PopConfig(ratio=0.0, batch="per_sequence"), PopConfig(budget=1.0):
        planned = plan_inputs(tiny("llama").config, config)
        assert planned.inputs == () and planned.ffns


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(EngineError, match="routed experts"):
        plan_inputs(tiny("mixtral").config, PopConfig(ratio=0.2, batch="per_sequence"))
    with pytest.raises(ConfigError, match="layer_ratios names layers"):
        plan_inputs(tiny("llama").config, PopConfig(ratio=0.2, layer_ratios={99: 0.1}, batch="per_sequence"))
    with pytest.raises(AdapterError, match="No adapter is registered"):
        plan_inputs(mamba(), PopConfig(ratio=0.2, batch="per_sequence"))


def mamba():
    from transformers import AutoConfig

    return AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)


def test_a_layer_that_does_not_ask_its_modules_is_found_by_the_first_forward():
    running = Running(PopConfig(ratio=0.3), plan_inputs(tiny("llama").config, PopConfig(ratio=0.3)), print)
    running.inputs = [channels(), channels()]
    for masked in running.inputs:
        masked.name = "layers.0.down"
    missing = pytest.raises(EngineError, match=r"computes layers\.0\.down \(and 0 more\) without asking")
    with missing, running.forward(forward(("a", 5, 0, 5, [0, 1]))):
        running.mask(running.inputs[0], values(5))
    with running.forward(forward(("a", 5, 0, 5, [0, 1]))):
        for masked in running.inputs:
            assert running.mask(masked, values(5)[None]).shape == (1, 5, WIDTH)
    assert running.mask(running.inputs[0], step := values(2)) is step  # made-up tokens of a warm-up
    assert "method pop, ratio 0.3, scope overall: took over" in running.summary
    assert running.reserve(3, torch.device("cpu")) == 3 * 2 * 4 * WIDTH


def engine_settings(**changes):
    """vLLM's settings, as far as the plug-in looks at them."""
    model = dict(
        runner_type="generate",
        is_multimodal_model=False,
        is_encoder_decoder=False,
        quantization=None,
        enforce_eager=False,
    )
    parallel = dict(pipeline_parallel_size=1, data_parallel_size=1, use_ubatching=False)
    parts = dict(quant_config=None, lora_config=None, speculative_config=None, kv_transfer_config=None)
    split = {
        name: {**own, **{key: changes.pop(key) for key in list(changes) if key in own}}
        for name, own in {
            "model_config": model,
            "parallel_config": parallel,
            "cache_config": dict(prefix_match_unit=None, kv_sharing_fast_prefill=False),
            "device_config": dict(device_type="cpu"),
        }.items()
    }
    found = SimpleNamespace(
        additional_config={}, **{name: SimpleNamespace(**own) for name, own in split.items()}, **parts
    )
    vars(found).update(changes)
    return found


def test_settings_of_the_engine():
    assert settings_of(engine_settings()) is None
    assert settings_of(engine_settings(additional_config={"other": 1})) is None
    found = settings_of(engine_settings(additional_config={"pop_mm": {"budget": 0.5}}))
    assert found.budget == 0.5 and found.batch == "per_sequence" and found.chosen_method == "thresholds"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (0.65, "'pop_mm' is an object of settings; got 0.65"),
        ({"ratoi": 0.2}, "Did you mean 'ratio'"),
        ({"ratio": 2}, "ratio must lie in"),
        ({"ratio": 0.2, "batch": "shared"}, "every request has its own choice"),
        ({"ratio": 0.2, "method_settings": {"prefill": "partition"}}, "prefill='partition' cannot be had in vLLM"),
        ({"ratio": 0.2, "modality_weights": {"image": 0.5}}, "modality_weights="),
        ({"ratio": 0.2, "backend": "inplace"}, "per_sequence"),
        ({"ratio": 0.2, "kernels": "compiled"}, "kernels='compiled' cannot be had"),
        ({"budget": 0.6, "method_settings": {"head_budget": 0.5}}, "its lm_head stays dense"),
        ({"ratio": 0.2, "method": "griffin"}, "The scorer 'griffin'"),
    ],
)
def test_settings_that_have_no_way(values, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        settings_of(engine_settings(additional_config={"pop_mm": values}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runner_type": "pooling"}, "decodes nothing"),
        ({"is_multimodal_model": True}, "takes pictures or sounds"),
        ({"is_encoder_decoder": True}, "has an encoder"),
        ({"quant_config": object(), "quantization": "awq"}, "quantised (awq)"),
        ({"lora_config": object()}, "LoRA is enabled"),
        ({"speculative_config": object()}, "speculative decoding is enabled"),
        ({"kv_transfer_config": object()}, "KV caches come from elsewhere"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism is enabled"),
        ({"data_parallel_size": 2}, "data parallelism is enabled"),
        ({"use_ubatching": True}, "two halves"),
        ({"prefix_match_unit": 16}, "parts of KV blocks"),
        ({"kv_sharing_fast_prefill": True}, "see only a part of a prompt's tokens"),
        ({"device_type": "cuda"}, "CUDA graphs may be captured"),
    ],
)
def test_what_the_engine_was_asked_for_and_has_no_way(changes, said):
    check_engine(engine_settings())
    check_engine(engine_settings(device_type="cuda", enforce_eager=True))
    with pytest.raises(EngineError, match=re.escape(said)):
        check_engine(engine_settings(**changes))


@pytest.mark.skipif(library(torch.float32) is None, reason="no compiled rows")
def test_one_running_request_reads_chosen_rows_and_gets_what_the_mask_leaves():
    weight = torch.rand(WIDTH) + 0.5
    found, matrix = entries(0.4, weight), torch.randn(WIDTH, 7, generator=torch.Generator().manual_seed(3))
    rows = ChosenRows(found, matrix, Room())
    prompt, one = forward(("a", 7, 0, 7, [0, 1])), forward(("a", 1, 7, 7, [0, 1]))
    two = forward(("a", 1, 7, 7, [0, 1]), ("b", 1, 7, 7, [2, 3]))
    found.leave_out(values(7), prompt)
    step = values(1, 1)
    assert rows.takes(step, one) and not rows.takes(values(2), two) and not rows.takes(values(7), prompt)
    assert not rows.takes(values(2), one)  # padded
    assert not rows.takes(step, forward(("a", 1, 7, 7, [0, 1]), ("c", 1, 0, 9, [4])))  # another's prompt beside it
    wanted = found.leave_out(step, one) @ matrix
    torch.testing.assert_close(rows(step, None, one), wanted)
    torch.testing.assert_close(rows(step[None], torch.ones(7), one), wanted[None] + 1)
    assert found.saw(one) and rows.bytes == matrix.numel() * 4
