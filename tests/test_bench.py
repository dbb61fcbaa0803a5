"""``pop-mm bench``: limits against hand counts, variants that take turns, and a model that stays what it was."""

import ctypes
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from helpers.tiny_folder import save
from helpers.tiny_models import VOCAB, tiny
from pop_mm import kernels
from pop_mm.adapters import adapter_for
from pop_mm.bench import BenchError, Setup, Source, check, measure, memory, run
from pop_mm.bench import configs as bench_configs
from pop_mm.bench.configs import CONFIGS, config_of, materialise, skeleton
from pop_mm.bench.limits import amdahl_limit, step_bytes
from pop_mm.bench.parts import PartClock, attention_modules, measure_parts, watched
from pop_mm.bench.prompts import Prompts
from pop_mm.bench.timing import decode_options, generate, generate_timed
from pop_mm.bench.variants import STOCK_DENSE, Cell, Variant, kernels_for, running
from pop_mm.kernels import MOST_TOKENS, Matvec
from pop_mm.kernels.ffn import FFNStep
from pop_mm.report.footprint import weights_per_token
from pop_mm.session.session import plan_ffns
from pop_mm.settings.config import PopConfig

PUBLISHED = {
    "llama2-7b": 6.74e9,
    "llama3.1-8b": 8.03e9,
    "llama3.2-1b": 1.24e9,
    "qwen3-8b": 8.19e9,
    "mixtral-8x7b": 46.7e9,
    "qwen3-30b-a3b": 30.5e9,
    "qwen2.5-vl-7b": 8.29e9,
}
ROW_KEYS = {
    *("method", "ratio", "budget", "gamma", "batch", "prompt", "cache", "new_tokens", "kernels", "compile", "backends"),
    *("prefill_s", "ttft_s", "decode_tokens_per_s", "step_s", "end_to_end_s", "peak_memory_bytes"),
    *("speedup", "speedup_quartiles", "speedup_same_kernels", "speedup_same_kernels_quartiles"),
    *("step_speedup", "ttft_speedup", "end_to_end_speedup"),
    *("byte_limit", "bytes_per_token", "amdahl_limit", "fraction_of_limit"),
    *("step_parts_s", "selection_share", "prompt_parts_s", "prompt_overhead"),
}
LAYERS = ("FFN", "routed experts", "shared experts", "attention")
COMPILED = kernels.why_not() is None
SMALL = Setup(prompts=(8,), new_tokens=5, rounds=1)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # half a second each among so many tests


# published dimensions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_the_published_size_and_can_be_pruned(name):
    model = skeleton(config_of(name))
    assert model.num_parameters() == pytest.approx(PUBLISHED[name], rel=0.01)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {plan.backend for plan in plan_ffns(model, PopConfig(0.4))} == {"inplace"}
    fewer = skeleton(config_of(name, 2))
    assert len({plan.ffn.layer for plan in plan_ffns(fewer, PopConfig(0.4))}) == 2


def test_random_weights_are_made_in_their_own_dtype_and_stay_tied(monkeypatch):
    shrink(monkeypatch, "llama3.2-1b")
    source = Source("llama3.2-1b", config=True, layers=1)
    assert source.label == "llama3.2-1b dimensions, 1 of 2 layers, random weights"
    model, tokenizer = source.load(torch.device("cpu"))
    assert tokenizer is None and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.model.norm.weight == 1).all()
    assert model.model.layers[0].mlp.up_proj.weight.float().std() == pytest.approx(0.02, rel=0.1)
    again, _ = source.load(torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    rows = measure(model, None, SMALL)["rows"]
    assert [row["method"] for row in rows] == ["dense", "pop", "pop"]


def test_random_weights_of_a_vision_model_are_prompted_with_text(monkeypatch):
    shrink(monkeypatch, "qwen2.5-vl-7b")
    source = Source("qwen2.5-vl-7b", config=True)
    model, _ = source.load(torch.device("cpu"))
    rows = measure(model, None, SMALL)["rows"]
    assert rows[1]["backends"] == {"inplace": 2}, "the vision tower is not pruned"
    assert "vision tower never runs" in source.notes[0]
    assert Source("llama2-7b", config=True).notes == []


def test_weights_that_do_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr(bench_configs, "free_memory", lambda device: 10**9)
    with pytest.raises(BenchError, match=r"13\.5 GB \(13476831232 bytes\) on cpu, but 1\.0 GB .*--layers"):
        materialise(skeleton(config_of("llama2-7b")), torch.device("cpu"))


def shrink(monkeypatch, name):
    """The same architecture with two small layers."""
    model_type, settings = CONFIGS[name]
    small = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    if "text_config" in settings:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
        vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 32, "num_heads": 4}
        ids = dict(image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93)
        text = {**settings["text_config"], **small, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
        changed = {**settings, **ids, "text_config": text, "vision_config": vision}
    else:
        changed = {**settings, **small}
    monkeypatch.setitem(CONFIGS, name, (model_type, changed))


# limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_step_bytes_are_those_of_the_tensors(load, tied):
    model = load("llama", torch.float32, tie_word_embeddings=tied)
    dense, pruned = (step_bytes(model, PopConfig(ratio), 3, 20) for ratio in (0.0, 0.4))
    named = dict(model.named_parameters())
    ffn = sum(p.nbytes for name, p in named.items() if ".mlp." in name and name.endswith("weight"))
    attention = sum(p.nbytes for name, p in named.items() if ".self_attn." in name and name.endswith("weight"))
    cache = 3 * 20 * 2 * 2 * 2 * 8 * 4  # rows, positions, layers, keys and values, heads, head size, float32
    parts = {"FFN": ffn, "attention": attention, "lm_head": 96 * 32 * 4, "KV cache": cache}
    assert dense.parts == parts
    sizes = plan_ffns(model, PopConfig(0.4))[0].sizes
    assert pruned.parts == {**parts, "FFN": pytest.approx(ffn * sizes.width / 64)}
    masked = step_bytes(model, PopConfig(0.4, batch="per_sequence", backend="masked"), 3, 20)
    assert masked == dense, "a masked FFN is read whole"


def test_step_bytes_of_experts_grow_with_the_batch_until_all_are_read(load):
    model = load("mixtral", torch.float32)
    expert = 2 * 3 * 24 * 32 * 4  # layers, projections, channels, hidden size, float32
    found = [step_bytes(model, PopConfig(0.0), batch, 8).parts["routed experts"] for batch in (1, 2, 3, 10)]
    assert found == [2 * expert, 4 * expert, 4 * expert, 4 * expert]
    sizes = plan_ffns(model, PopConfig(0.4))[0].sizes
    assert step_bytes(model, PopConfig(0.4), 2, 8).ffn == pytest.approx(4 * expert * sizes.width / 24)


def test_a_sliding_window_bounds_the_cache(load):
    model = load("ministral", torch.float32)  # one of two layers sees 64 positions
    cache = step_bytes(model, PopConfig(0.0), 1, 100).parts["KV cache"]
    assert cache == (100 + 64) * 2 * 2 * 8 * 4


def test_amdahl_limit():
    time, ffn, scaled = 10.0, 6.0, 0.5
    assert amdahl_limit(ffn / time, scaled) == pytest.approx(time / (time - ffn + ffn * scaled))
    assert amdahl_limit(0.7, 1.0) == 1


# measuring -----------------------------------------------------------------------------------------------------------


def test_rows(load):
    model = load("llama", torch.float32)
    asked = kernels_for(torch.device("cpu"), model.dtype)
    assert asked == ["stock", "compiled"] if COMPILED else ["stock"]
    ticks = []
    many = MOST_TOKENS + 1
    setup = Setup((1, 2, many), (8,), 5, (0.4,), ("pop", "static"), kernels=asked, rounds=1)
    results = measure(model, None, setup, lambda: ticks.append(1))
    assert len(ticks) == run.steps(setup) == 3 * 2
    json.dumps(results)
    variants = [("dense", None), ("pop", 0.4), ("static", 0.4)]
    found = [(r["batch"], r["kernels"], r["method"], r["ratio"]) for r in results["rows"]]
    few = [(batch, k, *v) for batch in (1, 2) for k in asked for v in variants]
    assert found == few + [(many, "stock", *v) for v in variants]
    for row in results["rows"]:
        assert set(row) == ROW_KEYS
        assert 0 < row["prefill_s"] < row["ttft_s"] < row["end_to_end_s"]
        assert row["peak_memory_bytes"] is None
        assert row["fraction_of_limit"] == pytest.approx(row["speedup_same_kernels"] / row["amdahl_limit"])
        low, high = row["speedup_quartiles"]
        assert low <= row["speedup"] <= high
        assert set(row["step_parts_s"]) == {"ffn", "attention", "lm_head", "selection", "framework"}
        assert all(row["step_parts_s"][name] > 0 for name in ("ffn", "attention", "lm_head", "framework"))
        if row["method"] == "dense":
            assert row["byte_limit"] == row["amdahl_limit"] == row["speedup_same_kernels"] == 1
            assert row["selection_share"] is row["prompt_parts_s"]["next"] is row["prompt_overhead"]["first"] is None
        else:
            assert 1 < row["amdahl_limit"] < row["byte_limit"] * 2
            assert (row["step_parts_s"]["selection"] > 0) == (row["method"] == "pop")
            for prompt in row["prompt_parts_s"].values():
                assert all(prompt[name] > 0 for name in ("statistics", "partition", "reordering", "forward"))
            assert min(row["prompt_overhead"].values()) > 0
    first = results["rows"][0]
    assert first["speedup"] == 1 and first["speedup_quartiles"] == (1, 1)
    assert any("larger batches go without" in note for note in results["notes"]) == COMPILED


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_rows_of_thresholds(load, model_type):
    model = load(model_type, torch.float32)
    asked = kernels_for(torch.device("cpu"), model.dtype)
    amounts = {"ratios": (0.3,), "budgets": (0.7,), "methods": ("thresholds", "pop")}
    results = measure(model, None, Setup((1, 2), (8,), 5, kernels=asked, rounds=1, **amounts))
    json.dumps(results)
    rows = {(r["batch"], r["method"], r["ratio"], r["budget"], r["kernels"]): r for r in results["rows"]}
    assert all(set(row) == ROW_KEYS for row in rows.values())
    fast = "rows" if COMPILED else "stock"
    row, dense = rows[1, "thresholds", None, 0.7, fast], rows[1, "dense", None, None, asked[-1]]
    assert set(row["backends"]) == ({"rows"} if COMPILED else {"masked"})
    assert row["fraction_of_limit"] == pytest.approx(row["speedup_same_kernels"] / row["amdahl_limit"])
    same = dense["decode_tokens_per_s"], row["decode_tokens_per_s"]
    assert row["speedup_same_kernels"] == pytest.approx(same[1] / same[0]), "over dense on the fastest kernels"
    if COMPILED:
        read, whole = (sum(n for k, n in r["bytes_per_token"].items() if k in LAYERS) for r in (row, dense))
        assert read == pytest.approx(0.7 * whole, rel=1e-3)
        assert row["amdahl_limit"] > rows[1, "pop", None, 0.7, "compiled"]["amdahl_limit"] or model_type == "mixtral"
        assert row["bytes_per_token"]["attention"] < dense["bytes_per_token"]["attention"]
    several = rows[2, "thresholds", None, 0.7, "stock"]
    assert set(several["backends"]) == {"masked"} and several["byte_limit"] == several["amdahl_limit"] == 1


def test_a_step_of_thresholds_is_timed_after_the_weights_are_turned(load, monkeypatch):
    model, seen = load("llama", torch.float32), []

    def timed(model, *args, **options):
        seen.append(model.model.layers[0].mlp.up_proj.weight.is_contiguous())
        return generate_timed(model, *args, **options)

    monkeypatch.setattr(run, "generate_timed", timed)
    measure(
        model, None, Setup(prompts=(8,), new_tokens=4, ratios=(), budgets=(0.5,), methods=("thresholds",), rounds=1)
    )
    assert sorted(seen) == ([False, False, True, True] if COMPILED else [True] * 4)


def test_every_round_has_every_variant_in_an_order_of_its_own(load, monkeypatch):
    model, seen = load("llama", torch.float32), []

    def timed(model, ids, new_tokens, **options):
        seen.append((ids.tolist(), "forward" in model.model.layers[0].mlp.__dict__))
        return generate_timed(model, ids, new_tokens, **options)

    monkeypatch.setattr(run, "generate_timed", timed)
    measure(model, None, Setup(prompts=(8,), new_tokens=4, ratios=(0.4,), rounds=5))
    rounds = [seen[start : start + 2] for start in range(0, len(seen), 2)]
    assert len(rounds) == 6
    prompts = [ids for (ids, _), (same, _) in rounds if ids == same]
    assert len(prompts) == len({str(ids) for ids in prompts}) == 6, "both variants get the prompt, each round another"
    assert {tuple(pruned for _, pruned in pair) for pair in rounds} == {(False, True), (True, False)}


def test_static_cache_and_a_mixture(load):
    model = load("mixtral", torch.float32)
    results = measure(model, None, Setup((2,), (8,), 5, (0.4,), caches=("dynamic", "static"), rounds=1))
    assert [(r["cache"], r["method"]) for r in results["rows"]] == [
        (cache, method) for cache in ("dynamic", "static") for method in ("dense", "pop")
    ]
    for row in results["rows"]:
        assert set(row["bytes_per_token"]) == {"routed experts", "attention", "lm_head", "KV cache"}
    assert results["rows"][1]["step_parts_s"]["selection"] > 0
    assert any("top-k experts" in note for note in results["notes"])


def test_options_of_generate():
    assert decode_options("dynamic", False) == {}
    assert decode_options("static", False) == {"cache_implementation": "static", "disable_compile": True}
    compiled = decode_options("static", True)
    assert not compiled["disable_compile"] and compiled["compile_config"]._compile_all_devices
    asked = []
    generate(SimpleNamespace(generate=lambda *a, **k: asked.append(k)), torch.ones(1, 3), 9, **compiled)
    assert asked[0]["min_new_tokens"] == asked[0]["max_new_tokens"] == 9
    assert asked[0]["compile_config"] is compiled["compile_config"] and not asked[0]["do_sample"]


# parts ---------------------------------------------------------------------------------------------------------------


def test_a_part_is_charged_without_what_is_in_it(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("pop_mm.bench.parts.time.perf_counter", lambda: next(clock))
    parts = PartClock(torch.device("cpu"))
    outer = parts.timed("ffn", parts.timed("selection", lambda: None))
    for step in range(4):
        if step:
            parts.push("framework")
            outer()
            parts.pop()
        parts.put(torch.zeros(1))
    assert parts.records[-1] == {"outside": 2, "framework": 2, "ffn": 2, "selection": 1}
    assert parts.parts().step == {"ffn": 2, "attention": 0, "lm_head": 0, "selection": 1, "framework": 4}
    assert parts.parts().ffn_share == 2 / 7


@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral", "qwen2_moe"])
def test_watching_leaves_nothing_behind(load, model_type):
    model = load(model_type, torch.float32)
    adapter = adapter_for(model)
    records = adapter.projections(model)
    mixers = attention_modules(model, adapter, records)
    assert len(mixers) == len({record.layer for record in records})
    assert all("Attention" in type(module).__name__ for module in mixers)
    ids = Prompts(model, None).ids(0, 1, 6)
    with running(model, SMALL, Variant("pop", 0.2, "stock")) as session:
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        assert session.events.listener is None
        with watched(model, records, session, PartClock(model.device)):
            assert all("forward" in module.__dict__ for module in (model.lm_head, *mixers))
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
        assert session.events.listener is None
        found = measure_parts(model, records, session, ids, 5)
    assert all(seconds > 0 for seconds in (*found.step.values(), *found.prompt.values()))


# prompts -------------------------------------------------------------------------------------------------------------


def test_prompts_repeat_passages_and_avoid_special_ids():
    model = tiny("llama", eos_token_id=[7, 9])
    plain = Prompts(model, None, seed=3)
    ids = plain.ids(0, 4, 500)
    assert ids.shape == (4, 500) and not torch.isin(ids, torch.tensor([0, 1, 7, 9])).any() and ids.max() < VOCAB
    assert torch.equal(plain.ids(0, 4, 500), ids) and not torch.equal(plain.ids(1, 4, 500), ids)

    def words(text, add_special_tokens):
        return SimpleNamespace(input_ids=[len(word) for word in text.split()][:50])

    read = Prompts(model, words)
    assert read.ids(0, 2, 700).shape == (2, 700)
    assert torch.equal(read.ids(0, 2, 700)[0, :100], read.ids(0, 2, 700)[0, 600:]), "12 passages of 50, then again"
    assert torch.equal(read.ids(0, 2, 80)[0, 50:], read.ids(0, 2, 80)[1, :30]), "the next row begins a passage later"


# what cannot be done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "llama2-7B", "--random-weights"], "Did you mean llama2-7b?"),
        (["--config", "llama2-7b"], "Add --random-weights"),
        (["--config", "llama2-7b", "--random-weights", "--layers", 33], "has 32 layers; --layers asks for 33"),
        (["--model", "LEARNED", "--prompt", 126, "--new-tokens", 4], "126 tokens and 4 new ones are 130"),
        (["--config", "llama2-7b", "--random-weights", "--ratio", 0.7], "must stay below 0.668"),
        (["--config", "llama2-7b", "--model", "x"], "Give --model, or --config"),
        ([], "Give --model, or --config"),
        (["--model", "x", "--layers", 1], "go with --config"),
        (["--model", "x", "--batch", 0], "0 is not from 1 to"),
        (["--model", "x", "--ratio", 1.5], "ratio must lie in [0, 1)"),
        (["--model", "x", "--ratio", 0], "give ratios above 0"),
        (["--model", "x", "--method", "full"], "methods must be of static, pop, thresholds; got 'full'"),
        (["--model", "x", "--budget", 1], "give budgets below 1"),
        (["--model", "x", "--budget", 2], "budget must be a number in (0, 1]"),
        (["--model", "x", "--method", "thresholds", "--ratio", 0.2], "thresholds takes budgets"),
        (["--config", "llama2-7b", "--random-weights", "--method", "pop", "--budget", 0.1], "reads at least"),
        (["--model", "x", "--cache", "paged"], "caches must be of dynamic, static"),
        (["--model", "x", "--compile"], "take the static cache alone"),
        (["--model", "x", "--batch-mode", "row"], "batch must be one of"),
        (["--model", "x", "--device", "abacus"], "The device 'abacus' cannot be used"),
        (["--model", "x", "--dtype", "int8"], "The dtype must be one of"),
        (["--model", "x", "--plot", "a.gif"], "needs one of the suffixes"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(call, monkeypatch, tmp_path, options, message):
    if "LEARNED" in options:
        options = [save(tmp_path / "learned", "gpt2") if option == "LEARNED" else option for option in options]
    monkeypatch.setattr(Source, "load", lambda *_: pytest.fail("it was built"))
    code, _, err = call("bench", *options)
    assert code == 2
    assert message in err


def test_the_compiled_kernel_where_there_is_none():
    with pytest.raises(BenchError, match="takes float32 and bfloat16, and the weights are float16"):
        kernels_for(torch.device("cpu"), torch.float16, ["compiled"])
    with pytest.raises(BenchError, match="it is for CPUs, and the device is cuda"):
        kernels_for(torch.device("cuda"), torch.float32, ["stock", "compiled"])
    with pytest.raises(BenchError, match="need a CUDA device, and the device is cpu"):
        kernels_for(torch.device("cpu"), torch.float32, ["triton"])
    assert kernels_for(torch.device("cuda"), torch.float32) == ["stock"]


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_the_dense_model_on_the_compiled_kernel(load, monkeypatch, model_type):
    model = load(model_type, torch.float32)
    read = []
    matvec, ffn = Matvec.__call__, FFNStep.__call__

    def product(self, rows, x):
        read.append(sum(r.columns * r.total for r in rows))
        return matvec(self, rows, x)

    def step(self, *args):
        read.append(sum(tensor.numel() for tensor in self._kept if tensor.dim() == 2))
        return ffn(self, *args)

    monkeypatch.setattr(Matvec, "__call__", product)
    monkeypatch.setattr(FFNStep, "__call__", step)
    ids = Prompts(model, None).ids(0, 1, 6)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with running(model, SMALL, Variant("dense", None, "compiled")):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
    adapter = adapter_for(model)
    dense = sum(weights_per_token(model, adapter, plan_ffns(model, PopConfig(0.0))).values())
    assert sum(read) == 5 * dense  # all that a token reads, at each of five steps
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_ratio_that_does_not_fit_the_model(load):
    with pytest.raises(ValueError, match=r"must stay below 0\.666"):
        check(load(), Setup(prompts=(8,), new_tokens=4, ratios=(0.7,)))


# the command ---------------------------------------------------------------------------------------------------------


def test_command(call, tmp_path):
    folder = save(tmp_path / "model")
    code, out, err = call(
        *("bench", "--model", folder, "--prompt", 8, "--new-tokens", 4, "--ratio", 0.2, "--rounds", 1),
        *("--kernels", "stock", "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--wide"),
    )
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "a.json").read_text())
    assert set(results) == {"model", "weight_format", "layers", "setup", "machine", "rows", "notes"}
    assert results["model"] == folder and results["setup"]["device"] == "cpu"
    assert [row["method"] for row in results["rows"]] == ["dense", "pop"]
    assert "batch 1, 8 tokens in, 4 out, dynamic cache" in out
    assert "pop 20%" in out and "Amdahl" in out and "scoring, selection" in out
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_command_says_how_many_layers_were_built(call, monkeypatch, tmp_path):
    shrink(monkeypatch, "mixtral-8x7b")
    options = ("--prompt", 8, "--new-tokens", 4, "--ratio", 0.4, "--rounds", 1, "--json", "-")
    code, out, err = call("bench", "--config", "mixtral-8x7b", "--random-weights", "--layers", 1, *options)
    assert code == 0
    results = json.loads(out)
    assert results["layers"] == 1
    assert results["model"] == "mixtral-8x7b dimensions, 1 of 2 layers, random weights"
    assert results["model"] in err, "with --json - the tables are on stderr"


def test_what_loading_has_freed_is_not_in_the_peak_after_it(tmp_path, monkeypatch):
    folder, libc = save(tmp_path / "model"), ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim") or not memory._reset_peak():
        pytest.skip("only glibc keeps freed memory and can give it back, only Linux resets peaks")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    own, before = Source.load, 0

    def load(*args):
        nonlocal before
        memory.hand_back()
        memory._reset_peak()
        before = memory._peak()
        blocks = [libc.malloc(100_000) for _ in range(3000)]
        for block in blocks:
            ctypes.memset(block, 1, 100_000)
        for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
            libc.free(block)
        return own(*args)

    monkeypatch.setattr(Source, "load", load)
    job = {"source": {"name": folder}, "setup": asdict(SMALL), "cell": Cell(1, 8, "dynamic"), "variant": STOCK_DENSE}
    found = memory._child({**job, "threads": torch.get_num_threads()})
    assert found["after_load"] < before + 150 * 10**6


def test_memory_of_a_process(tmp_path, monkeypatch):
    folder = save(tmp_path / "model")
    jobs = [(Cell(1, 8, "dynamic"), STOCK_DENSE), (Cell(1, 8, "dynamic"), Variant("pop", 0.4, "stock"))]

    def in_this_process(command, **_):
        assert command[-3:-1] == ["-m", "pop_mm.bench.memory"]
        found = memory._child(json.loads(command[-1]))
        return SimpleNamespace(returncode=0, stdout=json.dumps(found))

    monkeypatch.setattr(memory.subprocess, "run", in_this_process)
    found = memory.measure_memory(Source(folder), SMALL, jobs, repeats=2)
    assert list(found) == jobs
    assert all(peaks["whole"] > 2**20 for peaks in found.values())
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nMemoryError: no more")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(BenchError, match="MemoryError: no more"):
        memory.measure_memory(Source(folder), SMALL, jobs)
