"""vLLM with the plug-in gives the tokens of pop_mm's masked reference in transformers, whatever else runs in its batches.

``make test-vllm`` runs this file twice: with vLLM's V1 model runner for CPUs, and with its V2 runner.
"""

import pytest
from serving import V2, answers, engine, in_transformers, metric, prompts_of, save_llama

TOKENS = 12
SETTINGS = {
    "pop": {"ratio": 0.3},
    "static": {"budget": 0.7, "method": "static", "scope": "ffn"},
    "masked thresholds": {"budget": 0.6, "backend": "masked"},
    "thresholds": {"budget": 0.6},
}
BOTH = pytest.mark.parametrize(
    "settings", ["pop", "thresholds"], indirect=True
)  # what takes long, once for each method


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", params=SETTINGS)
def settings(request):
    return SETTINGS[request.param]


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(16, shared=40)


@pytest.fixture(scope="module")
def wanted(llama, settings, prompts):
    return in_transformers(llama, settings, prompts, TOKENS)


@pytest.fixture(scope="module")
def chunked(llama, settings):
    """An engine that prefills at most 64 tokens at once, and keeps prefixes."""
    with engine(llama, settings, max_num_batched_tokens=64) as llm:
        yield llm


@pytest.mark.parametrize("requests", [1, 4, 16])
def test_tokens_are_those_of_transformers(chunked, prompts, wanted, requests):
    hits = metric(chunked, "vllm:prefix_cache_hits")
    assert answers(chunked, prompts[:requests], TOKENS) == wanted[:requests]
    assert answers(chunked, prompts[:requests], TOKENS) == wanted[:requests]  # from cached prefixes
    assert metric(chunked, "vllm:prefix_cache_hits") - hits >= 64 * requests


def test_the_model_runner_is_the_one_that_was_asked_for(chunked):
    (found,) = chunked.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    assert found == ("pop_mm.engines.vllm.v2" if V2 else "pop_mm.engines.vllm.v1")


def test_something_is_left_out(llama, prompts, wanted):
    assert in_transformers(llama, {"ratio": 0.0}, prompts[:4], TOKENS) != wanted[:4]


def test_an_answer_that_comes_back_in_a_prompt_is_computed_again(chunked, llama, settings, prompts):
    """Its KV entries are those of a pruned model, and whether they are cached hangs on other requests."""
    answer = answers(chunked, prompts[:1], 60)[0]
    again = [[*prompts[0], *answer, *range(5, 25)]]
    hits = metric(chunked, "vllm:prefix_cache_hits")
    assert answers(chunked, again, TOKENS) == in_transformers(llama, settings, again, TOKENS)
    assert metric(chunked, "vllm:prefix_cache_hits") - hits == 64  # whole blocks of the first prompt, of 70 tokens


def test_parallel_sampling(chunked, prompts):
    from vllm import SamplingParams

    def sampled(**settings):
        params = SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, **settings)
        outputs = chunked.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
        return [list(found.token_ids) for found in outputs[0].outputs]

    assert sampled(n=3, seed=7) == [*sampled(seed=7), *sampled(seed=8), *sampled(seed=9)]


@BOTH
def test_preemption(llama, settings, prompts):
    """So few KV blocks that requests are thrown out while they decode, and are computed again."""
    tokens = 60
    few = dict(max_num_batched_tokens=64, num_gpu_blocks_override=16, max_model_len=192)
    wanted = in_transformers(llama, settings, prompts[:5], tokens)
    with engine(llama, settings, **few) as llm:
        assert answers(llm, prompts[:5], tokens) == wanted
        assert metric(llm, "vllm:num_preemptions") > 0
    with engine(llama, settings, enable_prefix_caching=False, **few) as llm:
        assert answers(llm, prompts[:5], tokens) == wanted
        assert metric(llm, "vllm:num_preemptions") > 0


@pytest.mark.skipif(V2, reason="compiled code would ask the interpreted Triton for a device")
@BOTH
def test_compiled(llama, settings, prompts, wanted):
    with engine(llama, settings, enforce_eager=False) as llm:
        assert answers(llm, prompts[:4], TOKENS) == wanted[:4]


@BOTH
def test_tensor_parallel(llama, settings, prompts, wanted):
    with engine(llama, settings, tensor_parallel_size=3, max_num_batched_tokens=64) as llm:
        assert answers(llm, prompts[:4], TOKENS) == wanted[:4]


@pytest.mark.parametrize("dense", [{"ratio": 0.0}, {"budget": 1.0}])
def test_settings_that_leave_nothing_out_are_the_dense_model(llama, prompts, dense):
    with engine(llama, dense) as llm:
        found = answers(llm, prompts[:2], TOKENS)
    with engine(llama, None) as llm:
        assert answers(llm, prompts[:2], TOKENS) == found
