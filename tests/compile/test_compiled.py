"""Compiled decode: one graph for all prompts, the same tokens and the same choices as without."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

from helpers.modes import backends, pruned
from helpers.observe import TRANSFORMERS_OWN, prompt
from helpers.tiny_models import tiny
from pop_mm import PhaseError

KERNELS = pytest.mark.parametrize("kernels", ["stock", "compiled"])
LAYOUTS = (
    "llama",
    "phi3",
    "gemma2",
    "qwen3",
    "starcoder2",
)  # separate, fused, another activation, norms, ungated and biased


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def generate(model, ids, compiled, steps=8, **settings):
    """Tokens and logits with a static cache; the graph is traced whole and run by torch's own operators."""
    if compiled:
        config = CompileConfig(fullgraph=True, mode=None, backend="eager")
        config._compile_all_devices = True
        settings["compile_config"] = config
    else:
        settings["disable_compile"] = True
    out = model.generate(
        ids,
        max_new_tokens=steps,
        do_sample=False,
        cache_implementation="static",
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def graphs():
    return counters["stats"]["unique_graphs"]


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


@KERNELS
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_compiled_steps_are_the_steps(model_type, kernels):
    model = tiny(model_type, torch.float32)
    reports = {}
    with pruned(model, "inplace", kernels=kernels) as session:
        expected = generate(model, prompt(), False, 40)
        reports["eager"] = session.report.to_dict()["ffns"]
    with pruned(model, "inplace", kernels=kernels) as session:
        assert_same(generate(model, prompt(), True, 40), expected)
        reports["compiled"] = session.report.to_dict()["ffns"]
    found = graphs()
    generate(model, prompt(), True, 40)
    assert found == graphs() - found  # as many as the dense model takes: one, or two with sliding windows
    assert reports["compiled"] == reports["eager"]  # choices of all 39 steps, also those that the log has folded


def test_one_graph_serves_prompts_of_all_lengths_and_two_sessions_do_not_count_together():
    model = tiny("llama", torch.float32)
    for number in range(12):  # more than torch.compile's limit of recompilations of one function
        with pruned(model, "inplace", ratio=0.5 if number % 2 else 0.4):
            before = graphs()
            for length in (9, 5, 12) if number < 2 else (9,):
                generate(model, prompt(length=length), True, 4, max_cache_len=64)
            assert graphs() == before + 1


@pytest.mark.parametrize("pads", [0, 3])
def test_rows_of_a_batch_share_the_choice_and_finished_ones_do_not_count(pads):
    model = tiny("llama", torch.float32)
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :pads] = 0
    with pruned(model, "inplace"):
        free = generate(model, ids, False, attention_mask=mask)[0]
    settings = {"attention_mask": mask, "eos_token_id": int(free[1, 2]), "pad_token_id": 0}
    with pruned(model, "inplace"):
        expected = generate(model, ids, False, **settings)
    with pruned(model, "inplace"):
        assert_same(generate(model, ids, True, **settings), expected)
    assert graphs() == 1


def test_every_prompt_is_decoded_by_its_own_partition():
    model = tiny("llama", torch.float32)
    prompts = [prompt(seed=seed) for seed in range(3)]
    expected = []
    for ids in prompts:
        with pruned(model, "inplace"):
            expected.append(generate(model, ids, False))
    with pruned(model, "inplace"):
        for ids, wanted in zip([*prompts, prompts[0]], [*expected, expected[0]], strict=True):
            assert_same(generate(model, ids, True), wanted)


def test_masked_steps_run_as_they_are():
    model = tiny("llama", torch.float32)
    with pruned(model, "masked"):
        expected = generate(model, prompt(), False)
    with pruned(model, "masked"):
        assert_same(generate(model, prompt(), True), expected)
    assert graphs() == 0


@backends
def test_the_model_is_left_without_a_trace(backend):
    model = tiny("llama", torch.float32)
    attributes = set(vars(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pruned(model, backend):
        generate(model, prompt(), True)
        assert "get_compiled_call" in vars(model)
    assert set(vars(model)) - attributes <= TRANSFORMERS_OWN
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    expected = generate(model, prompt(), False)
    assert_same(generate(model, prompt(), True), expected)  # and compiles again as transformers does


def test_what_a_step_refuses_it_refuses_compiled():
    model = tiny("llama", torch.float32)
    with pruned(model, "inplace"):
        step = model.get_compiled_call(CompileConfig(backend="eager"))
        with pytest.raises(PhaseError, match="empty"):
            step(input_ids=torch.zeros(1, 0, dtype=torch.long))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "nemotron_h", "deepseek_v3"])
def test_experts_are_looked_up_within_the_graph(model_type):
    model = tiny(model_type, torch.float32)
    reports = {}
    for compiled in False, True:
        with pruned(model, "inplace", unseen="weights", kernels="stock") as session:
            found = generate(model, prompt(length=30), compiled, 12)
            reports[compiled] = session.report.to_dict()["ffns"]
        if not compiled:
            expected = found
    assert_same(found, expected)
    assert graphs() > 0
    assert reports[True] == reports[False]  # tokens and active channels of every expert


def test_experts_that_wait_for_tokens_run_as_they_are():
    model = tiny("mixtral", torch.float32)
    with pruned(model, "inplace", min_tokens=1000):
        expected = generate(model, prompt(), False)
    with pruned(model, "inplace", min_tokens=1000):
        assert_same(generate(model, prompt(), True), expected)
    assert graphs() == 0
