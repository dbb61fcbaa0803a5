"""``--weights int8``: what is quantised, what commands say of it, and what they compare with."""

import copy
import json
import sys

import pytest
import torch
from test_tune import SIZES, TEXTS, Words

from helpers.tiny_folder import save
from helpers.tiny_models import VOCAB, tiny
from helpers.tiny_vlm_folder import save_vlm
from pop_mm.evaluation.fidelity import compare_rows, step_logits
from pop_mm.evaluation.run import Point, Run, Setup
from pop_mm.evaluation.texts import Window
from pop_mm.formats import format_of
from pop_mm.samples import load
from pop_mm.samples.quantise import QuantiseError, quantise, quantised_copy
from pop_mm.tuning import tune

pytest.importorskip("torchao")
LARGER = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "llama", **LARGER)


def int8_of(model):
    return {n.removesuffix(".weight") for n, p in model.named_parameters() if format_of(p).name == "int8"}


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "opt"])
def test_all_linears_of_the_decoder_layers(model_type):
    model = quantise(tiny(model_type))
    linears = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert int8_of(model) == {name for name in linears if ".layers." in name or ".h." in name} != set()
    assert type(model.get_output_embeddings().weight) is torch.nn.Parameter


def test_routers_experts_and_gates_of_shared_experts_stay():
    model = quantise(tiny("qwen2_moe"))
    layer = {name.removeprefix("model.layers.1.") for name in int8_of(model) if ".layers.1." in name}
    attention = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert layer == attention | {f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}


def test_of_a_vlm_the_language_tower_alone(tmp_path):
    from pop_mm.samples import load_vision

    model, _ = load_vision(save_vlm(tmp_path), weights="int8")
    names = int8_of(model)
    assert names and all(name.startswith("model.language_model.layers.") for name in names)


def test_refusals(monkeypatch, folder):
    with pytest.raises(QuantiseError, match=r"GPT2LMHeadModel has no nn\.Linear in its decoder layers"):
        quantise(tiny("gpt2"))
    with pytest.raises(QuantiseError, match="quantised already"):
        quantise(quantise(tiny("llama")))
    with pytest.raises(QuantiseError, match=r"is torch\.float64.*dtype='bfloat16'"):
        quantise(tiny("llama", torch.float64))
    with pytest.raises(QuantiseError, match=r"auto, int8, int8\+head; got 'int3'"):
        load(folder, weights="int3")
    model = tiny("llama")
    assert quantise(model, "auto") is model is quantised_copy(model, "auto") and not int8_of(model)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(QuantiseError, match=r'pip install "pop_mm\[int8\]"'):
        load(folder, weights="int8")


def test_the_lm_head_too_becomes_a_copy_of_its_own():
    model = tiny("llama", tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    quantise(model, "int8+head")
    assert "lm_head" in int8_of(model) and torch.equal(model.get_input_embeddings().weight, before)
    assert type(model.get_input_embeddings().weight) is torch.nn.Parameter


def test_a_copy_leaves_the_model_as_it_is():
    model = tiny("llama")
    copied = quantised_copy(model, "int8")
    assert int8_of(copied) and not int8_of(model)


# commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", [("--budget", 0.6), ("--ratio", 0.2)])
def test_inspect_counts_a_byte_for_each_weight_and_its_scales(call, folder, amount):
    rows = {}
    for weights in "auto", "int8":
        code, out, err = call("inspect", "--model", folder, *amount, "--json", "--weights", weights)
        assert (code, err) == (0, "")
        rows[weights] = [row for row in json.loads(out) if row["role"] == "dense"]
        assert {row["weight_format"] for row in rows[weights]} == {weights}
    for plain, int8 in zip(rows["auto"], rows["int8"], strict=True):
        assert plain["bytes_per_token_dense"] == 4 * 3 * 64 * 128
        assert int8["bytes_per_token_dense"] == 3 * 64 * 128 + 4 * (2 * 128 + 64)


def test_generate_and_bench(call, folder, tmp_path):
    asked = ("--model", folder, "--weights", "int8", "--json")
    code, _, err = call("generate", "--prompt", "w5 w9 w40", "--max-new-tokens", 4, *asked, tmp_path / "a.json")
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["weight_format"] == "int8" and values["dense"]["text"]
    sizes = ("--prompt", 8, "--new-tokens", 4, "--rounds", 1, "--kernels", "stock", "--budget", 0.6)
    code, _, err = call("bench", *sizes, *asked, tmp_path / "b.json")
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "b.json").read_text())
    assert values["weight_format"] == "int8" and "int8 weights" in values["model"]
    assert any("without --weights" in note for note in values["notes"])
    layer, scales = 3 * 64 * 128, 4 * (2 * 128 + 64)
    assert values["rows"][0]["bytes_per_token"]["FFN"] == 2 * (layer + scales)


def test_a_quantised_checkpoint_is_not_quantised_again(call, folder, tmp_path):
    config = json.loads((tmp_path.__class__(folder) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, _, err = call("inspect", "--model", tmp_path, "--weights", "int8")
    assert code == 2 and "is quantised already" in err


@pytest.mark.parametrize("granularity", ["PerRow", "PerGroup"])
def test_inspect_knows_checkpoints_of_torchao(call, folder, tmp_path, granularity):
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow
    from transformers import AutoModelForCausalLM, TorchAoConfig

    form = Int8WeightOnlyConfig(granularity={"PerRow": PerRow(), "PerGroup": PerGroup(32)}[granularity])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(form))
    model.save_pretrained(tmp_path)
    for amount, backend in (("--budget", "rows"), ("--ratio", "inplace")):
        rows = json.loads(call("inspect", "--model", tmp_path, amount, 0.4, "--json")[1])
        rows = [row for row in rows if row["role"] == "dense"]
        assert {row["backend"] for row in rows} == {backend if granularity == "PerRow" else "masked"}
        if granularity == "PerRow":
            assert {row["bytes_per_token_dense"] for row in rows} == {3 * 64 * 128 + 4 * (2 * 128 + 64)}


def windows(count, tokens):
    generator = torch.Generator().manual_seed(0)
    return [Window(str(n), torch.randint(3, VOCAB, (tokens,), generator=generator)) for n in range(count)]


def test_eval_compares_with_the_model_that_is_not_quantised():
    reference = tiny("llama", **LARGER)
    model = quantised_copy(reference, "int8")
    setup = Setup("tiny", prompt=12, continuation=6, generate=4, batch_size=2, weight_format="int8")
    texts = windows(2, setup.tokens)
    points = [Point("dense"), Point("thresholds", budget=0.6)]
    run = Run(model, setup, texts, reference=reference)
    run.work(points)
    results = run.results(points)
    dense, pruned = results["rows"]
    ids = torch.stack([text.ids for text in texts])
    wanted = compare_rows(step_logits(reference, ids, 12), step_logits(model, ids, 12), ids, 12)
    assert dense["kl"] == pytest.approx(sum(score.kl for score in wanted) / 2) and 0 < dense["kl"] < pruned["kl"]
    assert dense["weight_format"] == pruned["weight_format"] == "int8"
    layers = sum(p.numel() for n, p in reference.named_parameters() if "layers" in n and p.dim() == 2)
    head = reference.lm_head.weight.numel()
    scales = sum(len(p) for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)
    assert dense["bytes_read"] == layers + 4 * scales + 4 * head
    assert dense["cost"]["bytes_share"] == pytest.approx((layers + 4 * scales + 4 * head) / (4 * (layers + head)))
    from pop_mm.evaluation.show import cells, title

    assert "int8 weights, compared with the dense model that is not quantised" in title(results["setup"])
    assert cells(dense, 4)[4] != "-" and cells(dense, 4)[-3] != "-"


def test_the_eval_command(call, folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + n * n % 60}" for n in range(40)))
    sizes = ("--prompt", 12, "--continuation", 6, "--generate", 0, "--text", text)
    code, _, err = call(
        *("eval", "--model", folder, *sizes, "--method", "thresholds", "--budget", 0.6),
        *("--weights", "int8", "--json", tmp_path / "a.json"),
    )
    assert (code, err) == (0, "")
    values = json.loads((tmp_path / "a.json").read_text())
    assert values["setup"]["weight_format"] == "int8" and values["rows"][0]["kl"] > 0


def test_tune_compares_with_the_model_that_is_not_quantised():
    reference = tiny("llama", **LARGER)
    model = quantised_copy(reference, "int8")
    before = copy.deepcopy(model)
    found = tune(model, Words(), max_kl=1e6, text=TEXTS, reference=reference, **SIZES)
    same = tune(model, Words(), max_kl=1e6, text=TEXTS, **SIZES)
    at = {point.budget: point.kl for point in same.curve}
    assert all(point.kl != at.get(point.budget) for point in found.curve)
    for (name, p), other in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(getattr(p, "qdata", p), getattr(other, "qdata", other)), name
