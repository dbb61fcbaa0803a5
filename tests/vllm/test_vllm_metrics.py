"""``/metrics`` and the log say what decode steps kept, and it is what they kept.

vLLM loads its plug-ins' statistics in servers alone, so offline engines are given them here.
"""

import asyncio
from contextlib import contextmanager

import pytest
import torch
from prometheus_client import REGISTRY
from serving import V2, answers, engine, prompts_of, save_llama
from transformers import AutoModelForCausalLM

import pop_mm
from pop_mm.engines.vllm.planned import plan_inputs

TOKENS = 12
KEPT, ALL = "pop_mm:decode_weight_bytes_kept_total", "pop_mm:decode_weight_bytes_total"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def prompts():
    return prompts_of(4)


def counters(engine="0"):
    """Bytes kept and all, of engines of this process with that number; 0 where they are absent."""
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples if sample.name in (KEPT, ALL)]
    return [sum(s.value for s in samples if s.name == name and s.labels["engine"] == engine) for name in (KEPT, ALL)]


@contextmanager
def counted(folder, settings, number, **vllm):
    """An offline engine whose statistics are counted as those of engine ``number``, and its logger."""
    from vllm.v1.metrics.loggers import PerEngineStatLoggerAdapter

    from pop_mm.engines.vllm.metrics import PopStatLogger

    with engine(folder, settings, **vllm) as llm:
        logger = PopStatLogger(llm.llm_engine.vllm_config, number)
        adapter = PerEngineStatLoggerAdapter(llm.llm_engine.vllm_config, [0], lambda config, index: logger)
        llm.llm_engine.logger_manager.stat_loggers.append(adapter)
        yield llm, logger


def kept_in_transformers(folder, settings, prompts, tokens):
    """Share of the planned weights that the masked reference keeps, over all prompts."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = total = 0
    with pop_mm.prune(model, **{"batch": "per_sequence", "backend": "masked", **settings}) as session:
        for prompt in prompts:
            ids = torch.tensor([prompt])
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            found = [each for each in session.report.inputs if each.plan.backend != "dense"]
            kept += sum(each.weights * each.kept for each in found)
            total += sum(each.weights for each in found)
    return kept / total


def bytes_of(folder, settings):
    """Of the float32 weights that stand for the planned inputs, and of those that POP's plan keeps."""
    config = AutoModelForCausalLM.from_pretrained(folder).config
    planned = plan_inputs(config, pop_mm.PopConfig(batch="per_sequence", **settings)).inputs
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(config).named_modules())
    sizes = [4 * sum(modules[name].weight.numel() for name in found.modules) for found in planned]
    return sum(sizes), sum(size * found.share for size, found in zip(sizes, planned, strict=True))


def test_pop_keeps_what_its_plan_says(llama, prompts):
    settings = {"ratio": 0.3}
    total, kept = bytes_of(llama, settings)
    with counted(llama, settings, 10) as (llm, _):
        answers(llm, prompts, TOKENS)
        found = counters("10")
        assert found[1] == 4 * (TOKENS - 1) * total  # a prefill gives the first token
        assert found[0] == pytest.approx(4 * (TOKENS - 1) * kept, rel=1e-12)


@pytest.mark.parametrize("scope", ["overall"] if V2 else ["overall", "ffn"])
def test_thresholds_keep_what_they_keep_in_transformers_masked_or_by_rows(llama, prompts, scope):
    settings = {"budget": 0.6, "scope": scope}
    total, _ = bytes_of(llama, settings)
    wanted = kept_in_transformers(llama, settings, prompts, TOKENS)
    found = {}
    for number, backend in enumerate(["auto", "masked"], 20 if scope == "overall" else 22):
        with counted(llama, {**settings, "backend": backend}, number) as (llm, _):
            (how,) = llm.collective_rpc(lambda worker: worker.model_runner.pop_mm.summary)
            assert ("by chosen rows" in how) == (backend == "auto")
            for prompt in prompts:  # one at a time: by rows, where they are
                answers(llm, [prompt], TOKENS)
            found[backend] = counters(str(number))
    assert found["auto"][1] == found["masked"][1] == 4 * (TOKENS - 1) * total
    for kept, of in found.values():
        assert kept / of == pytest.approx(wanted, abs=1e-4)
        assert kept / of == pytest.approx(0.6, abs=0.05)
    assert found["auto"][0] == pytest.approx(found["masked"][0], rel=1e-4)


def test_log_line_and_two_engines(llama, prompts, monkeypatch):
    said = []
    with counted(llama, {"ratio": 0.3}, 30) as (first, logger), counted(llama, None, 31) as (second, other):
        answers(first, prompts[:1], TOKENS)
        answers(second, prompts, TOKENS)
        kept, total = counters("30")
        monkeypatch.setattr("pop_mm.engines.vllm.metrics.logger.info", lambda text, *values: said.append(text % values))
        for each in logger, logger, other:
            each.log()
    share = f"{100 * kept / total:.1f}%"
    assert said == [f"pop_mm: 11 decode tokens since the last line kept {share} of the pruned modules' weights"]
    assert counters("31") == [0, 0]


def test_an_engine_without_statistics_and_steps_without_tokens(llama, prompts):
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

    from pop_mm.engines.vllm.carried import with_counts
    from pop_mm.engines.vllm.counts import Counts

    for output in None, EMPTY_MODEL_RUNNER_OUTPUT:
        assert with_counts(output, lambda: Counts(1, 2, 3)) is output
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, "pop_mm_counts")
    with engine(llama, {"ratio": 0.3}, disable_log_stats=True) as llm:
        assert len(answers(llm, prompts[:1], TOKENS)[0]) == TOKENS


@pytest.mark.skipif(V2, reason="the way is the same, and slow where Triton is interpreted")
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_server_counts_what_its_workers_did_in_processes_of_their_own(llama, prompts, ranks, monkeypatch):
    """As ``vllm serve`` runs the engine. With ranks, their first one counts its part."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "pop_mm")
    settings = {"budget": 0.6}
    arguments = AsyncEngineArgs(
        model=llama,
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 * 2**20,
        tensor_parallel_size=ranks,
        additional_config={"pop_mm": settings},
    )

    async def serve():
        llm = AsyncLLM.from_engine_args(arguments)
        try:
            params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
            for number, prompt in enumerate(prompts):
                async for _ in llm.generate({"prompt_token_ids": prompt}, params, str(number)):
                    pass
        finally:
            llm.shutdown()

    before = counters()
    asyncio.run(serve())
    kept, total = (after - earlier for after, earlier in zip(counters(), before, strict=True))
    assert total == 4 * (TOKENS - 1) * bytes_of(llama, settings)[0] / ranks
    wanted = kept_in_transformers(llama, settings, prompts, TOKENS)
    assert kept / total == pytest.approx(wanted, abs=1e-4 if ranks == 1 else 0.03)
