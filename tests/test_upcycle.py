"""Upcycling: every model computes what its source does, its routers really route, and mistakes write nothing."""

import json
import re
import shutil
from collections import defaultdict

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from helpers.tiny_models import VOCAB, tiny
from helpers.tiny_vlm_folder import save_vlm
from pop_mm.errors import PopError
from pop_mm.samples import SAMPLES, Sample, SampleError, fetch, load, load_passages, load_vision
from pop_mm.samples import upcycle as module
from pop_mm.samples.upcycle import UpcycleError, logit_difference, upcycle
from pop_mm.vision import prepare

PLAIN = {"mlp_bias": False, "attention_bias": False}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
IDS = torch.randint(3, VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))


def save(folder, model_type="llama", dtype=torch.float32, **settings):
    """A tiny source of no sliding window and, but for qwen2, no biases."""
    settings = {"sliding_window": None, **(PLAIN if model_type == "llama" else {}), **settings}
    tiny(model_type, dtype, **settings).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def llama(tmp_path):
    return save(tmp_path / "llama")


def make(source, to, folder, **options):
    return AutoModelForCausalLM.from_pretrained(upcycle(source, to, folder, progress=False, **options).path)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids).logits.double()


def routes(model, ids=IDS):
    """Per layer, the experts of each token, [tokens, top_k]."""
    found = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda module, args, output: found.append(output[2]))
        for layer in model.model.layers
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    return found


# the same function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "to", "settings"),
    [
        ("llama", "mixtral", {}),
        ("llama", "mixtral", {"tie_word_embeddings": True, "head_dim": 16, "rms_norm_eps": 1e-3}),
        ("llama", "mixtral", {"rope_parameters": LLAMA3, "hidden_act": "gelu"}),
        ("llama", "mixtral", {"rope_parameters": YARN}),
        ("llama", "qwen2_moe", {}),
        ("llama", "qwen2_moe", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": YARN}),
        ("mistral", "mixtral", {"sliding_window": 5}),
        ("mistral", "qwen2_moe", {"head_dim": 16}),
        ("qwen2", "qwen2_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
        ("qwen3", "qwen3_moe", {}),
        ("qwen3", "qwen3_moe", {"attention_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
        ("qwen3", "qwen3_moe", {**WINDOW, "max_window_layers": 0}),
    ],
)
def test_computes_what_the_source_does(tmp_path, model_type, to, settings):
    source = save(tmp_path / "source", model_type, **settings)
    dense, _ = load(source)
    moe = make(source, to, tmp_path / "moe")
    assert moe.config.model_type == to
    assert moe.dtype == torch.float32
    assert moe.config.tie_word_embeddings == dense.config.tie_word_embeddings
    assert moe.config.rope_parameters == dense.config.rope_parameters
    torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=2e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(moe.generate(IDS, **settings), dense.generate(IDS, **settings))
    if window := getattr(dense.config, "sliding_window", None):
        dense.config.sliding_window = None if model_type == "mistral" else 2 * window
        assert (logits(moe) - logits(dense)).abs().max() > 0.01, "the window does not matter here"


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 1), (3, 3), (8, 2)])
@pytest.mark.parametrize("to", ["mixtral", "qwen2_moe"])
def test_any_number_of_experts(tmp_path, llama, to, experts, top_k):
    made = upcycle(llama, to, tmp_path / "deep" / "moe", experts=experts, top_k=top_k, progress=False)
    moe, dense = AutoModelForCausalLM.from_pretrained(made.path), load(llama)[0]
    torch.testing.assert_close(logits(moe), logits(dense), rtol=0, atol=2e-5)
    assert routes(moe)[0].shape == (IDS.numel(), top_k)
    assert (made.source_parameters, made.parameters) == (dense.num_parameters(), moe.num_parameters())
    routed = sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
    assert made.active_parameters == made.parameters - routed + routed * top_k // experts


def test_dtype_is_kept(tmp_path):
    source = save(tmp_path / "source", dtype=torch.bfloat16)
    moe = make(source, "qwen2_moe", tmp_path / "moe")
    assert {weight.dtype for weight in moe.state_dict().values()} == {torch.bfloat16}
    reference = logits(load(source)[0])
    assert (logits(moe) - reference).abs().max() < 0.05 * reference.abs().max()


def test_zero_biases_that_the_target_lacks_are_left_out(tmp_path):
    model = tiny("llama", **{**PLAIN, "mlp_bias": True, "attention_bias": True})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
    source = save(tmp_path / "source")
    model.save_pretrained(source)
    assert (logits(make(source, "mixtral", tmp_path / "moe")) - logits(model)).abs().max() < 2e-5


def test_tokenizer_and_generation_config(tmp_path, llama):
    settings = {"do_sample": False, "temperature": 0.7, "max_new_tokens": 5}  # loads, but transformers does not save it
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps(settings))
    moe = make(llama, "mixtral", tmp_path / "moe")
    assert {name: getattr(moe.generation_config, name) for name in settings} == settings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]


@pytest.mark.parametrize("to", ["mixtral", "qwen2_moe"])
def test_smollm2(tmp_path, to):
    dense, tokenizer = load("smollm2-135m")
    ids = tokenizer(load_passages()["carroll_alice"], return_tensors="pt")["input_ids"][:, :300]
    reference = logits(dense, ids)
    del dense
    moe = make("smollm2-135m", to, tmp_path / "moe")
    shutil.rmtree(tmp_path)  # pytest would keep gigabytes of it
    difference = (logits(moe, ids) - reference).abs().max()
    assert difference < 1e-3
    shares = torch.stack(
        [torch.bincount(chosen.flatten(), minlength=4) / chosen.numel() for chosen in routes(moe, ids)]
    )
    assert shares.min() > 0, "an expert is never used"
    assert (shares.max(dim=1).values < 0.5).float().mean() > 0.9, "one expert serves every token"


# routers and noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["mixtral", "qwen2_moe"])
def test_tokens_take_different_experts(tmp_path, llama, to):
    chosen = routes(make(llama, to, tmp_path / "a"))
    assert len(chosen) == 2
    for layer in chosen:
        assert set(layer.flatten().tolist()) == {0, 1, 2, 3}
        assert len({tuple(sorted(pair)) for pair in layer.tolist()}) > 3
    again, other = (routes(make(llama, to, tmp_path / name, router_seed=seed)) for name, seed in (("b", 0), ("c", 1)))
    assert all(map(torch.equal, chosen, again))
    assert not any(map(torch.equal, chosen, other))


@pytest.mark.parametrize("to", ["mixtral", "qwen2_moe"])
def test_perturb(tmp_path, llama, to):
    runs = defaultdict(dict)
    for name, options in {
        "exact": {},
        "noisy": {"perturb": 0.1},
        "again": {"perturb": 0.1},
        "other": {"perturb": 0.1, "router_seed": 1},
    }.items():
        runs[name] = make(llama, to, tmp_path / name, **options).state_dict()
    assert all(torch.equal(runs["noisy"][name], runs["again"][name]) for name in runs["noisy"])
    changed = {name for name in runs["exact"] if not torch.equal(runs["exact"][name], runs["noisy"][name])}
    assert changed == {name for name in runs["exact"] if ".experts." in name}
    for name in changed:
        exact, noisy, other = (runs[run][name] for run in ("exact", "noisy", "other"))
        assert not torch.equal(noisy, other)
        for part in (slice(None),) if "down" in name else (slice(64), slice(64, None)):  # gate and up projection
            noise = (noisy - exact)[:, part]
            for expert in range(4):
                size = noise[expert].square().mean().sqrt() / exact[expert, part].square().mean().sqrt()
                assert float(size) == pytest.approx(0.1, rel=0.1)
            assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.15


# vision-language models ---------------------------------------------------------------------------------------------


def seen(processor, model, question="What is this?"):
    return prepare(processor, module._picture(), question, model=model)


VLM_SETTINGS = {
    "plain": {},
    "tied": {"tied": True, "attention_bias": True},
    "square down": {"intermediate_size": 32},  # saving and loading transposes experts by their shapes
    "square gate and up": {"intermediate_size": 16},
}


@pytest.mark.parametrize("settings", VLM_SETTINGS.values(), ids=VLM_SETTINGS)
def test_a_vision_language_model_computes_what_the_source_does(tmp_path, settings):
    source = save_vlm(tmp_path / "source", **settings)
    made = upcycle(source, "qwen3_vl_moe", tmp_path / "moe", progress=False)
    (dense, _), (moe, processor) = load_vision(source), load_vision(str(made.path))
    text = moe.config.text_config
    assert moe.config.model_type == "qwen3_vl_moe"
    assert (text.num_experts, text.num_experts_per_tok, text.decoder_sparse_step, text.mlp_only_layers) == (4, 2, 1, [])
    assert text.rope_parameters == dense.config.text_config.rope_parameters
    assert moe.config.tie_word_embeddings == text.tie_word_embeddings == dense.config.tie_word_embeddings
    inputs = seen(processor, moe)
    assert (inputs["input_ids"] == moe.config.image_token_id).sum() >= 4
    with torch.no_grad():
        expected, found = dense(**inputs).logits, moe(**inputs).logits
        other = dense(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert (other - expected).abs().max() > 0.01, "the picture does not matter here"
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(moe.generate(**inputs, **options), dense.generate(**inputs, **options))
    before, after = dense.state_dict(), moe.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items() if name in after)
    assert {name for name in before if name not in after} == {
        name for name in before if ".mlp." in name and "_proj" in name
    }
    assert (made.source_parameters, made.parameters) == (dense.num_parameters(), moe.num_parameters())
    experts = sum(weight.numel() for name, weight in moe.named_parameters() if ".experts." in name)
    assert made.active_parameters == made.parameters - experts // 2


def test_the_tokens_of_pictures_and_words_take_different_experts(tmp_path):
    moe, processor = load_vision(str(upcycle(save_vlm(tmp_path / "a"), "qwen3_vl_moe", tmp_path / "b").path))
    chosen = []
    for layer in moe.model.language_model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: chosen.append(output))
    inputs = seen(processor, moe)
    with torch.no_grad():
        moe(**inputs)
    assert len(chosen) == 2
    for _, weights, experts in chosen:
        assert experts.shape == (inputs["input_ids"].numel(), 2)
        assert set(experts.flatten().tolist()) == {0, 1, 2, 3}
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


def test_perturb_changes_the_experts_of_the_language_tower_only(tmp_path):
    source = save_vlm(tmp_path / "source", torch.bfloat16)
    names = {"exact": 0.0, "noisy": 0.1}
    made = {
        name: load_vision(str(upcycle(source, "qwen3_vl_moe", tmp_path / name, perturb=noise, progress=False).path))[0]
        for name, noise in names.items()
    }
    exact, noisy = (model.state_dict() for model in made.values())
    assert {weight.dtype for weight in noisy.values()} == {torch.bfloat16}
    changed = {name for name in exact if not torch.equal(exact[name], noisy[name])}
    assert changed == {name for name in exact if ".experts." in name}
    assert all(name.startswith("model.language_model.layers.") for name in changed)


def test_the_processors_files_are_those_of_the_source(tmp_path):
    source = save_vlm(tmp_path / "source")
    (tmp_path / "source" / "video_preprocessor_config.json").write_text(
        "{}"
    )  # needs torchvision, so is not loaded here
    made = upcycle(source, "qwen3_vl_moe", tmp_path / "moe", progress=False).path
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
        assert (made / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert not (made / "processor_config.json").exists()
    with pytest.raises(
        UpcycleError, match=r"qwen3_vl takes images, a mixtral takes text.*\(qwen3_vl\) use qwen3_vl_moe"
    ):
        upcycle(source, "mixtral", tmp_path / "mixtral", progress=False)


# mistakes -----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "target": (
        "llama",
        {},
        {"to": "mixtrel"},
        r"no target 'mixtrel'.*mixtral, qwen2_moe, qwen3_moe, qwen3_vl_moe\. Did you mean mixtral\?",
    ),
    "dash": ("llama", {}, {"to": "qwen2-moe"}, "Did you mean qwen2_moe"),
    "top_k": ("llama", {}, {"top_k": 5}, "cannot use 5 of 4 experts"),
    "no top_k": ("llama", {}, {"top_k": 0}, "cannot use 0 of 4 experts"),
    "experts": ("llama", {}, {"experts": 0}, "cannot use 2 of 0 experts"),
    "perturb": ("llama", {}, {"perturb": -0.1}, r"noise \(perturb\) must be 0 or a positive number, but is -0.1"),
    "nan": ("llama", {}, {"perturb": float("nan")}, "but is nan"),
    "seed": ("llama", {}, {"router_seed": -1}, "seed must not be negative"),
    "type": ("gpt2", {}, {}, "'.*source' is a gpt2; upcycling takes llama, mistral, qwen2, qwen3, qwen3_vl\\."),
    "no norms": (
        "llama",
        {},
        {"to": "qwen3_moe"},
        r"attention of qwen3_moe normalises.*\(llama\) use mixtral or qwen2_moe",
    ),
    "no images": (
        "qwen3",
        {},
        {"to": "qwen3_vl_moe"},
        r"qwen3_vl_moe takes images, a qwen3 takes text.*made from qwen3_vl; .*\(qwen3\) use qwen3_moe\.",
    ),
    "norms": ("qwen3", {}, {}, r"attention of qwen3 normalises.*mixtral does not.*\(qwen3\) use qwen3_moe"),
    "biases": ("qwen2", {}, {}, "has weights that mixtral does not have: self_attn.k_proj.bias"),
    "mlp": (
        "llama",
        {"mlp_bias": True},
        {"to": "qwen2_moe"},
        "mlp.down_proj.bias, mlp.gate_proj.bias, mlp.up_proj.bias",
    ),
    "o_proj": ("llama", {"attention_bias": True}, {"to": "qwen2_moe"}, r"does not have: self_attn.o_proj.bias\."),
    "window": ("mistral", {"sliding_window": 5}, {"to": "qwen2_moe"}, "sliding window.*use mixtral"),
    "windows": ("qwen2", {**WINDOW, "max_window_layers": 1}, {}, "Only some layers.*in mixtral, all have one or none"),
    "narrow": ("llama", {"intermediate_size": 66}, {}, "rows of 32 and 66 numbers of 4 bytes.*multiple of 16 bytes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_writes_nothing(tmp_path, mistake):
    model_type, settings, options, said = MISTAKES[mistake]
    source = save(tmp_path / "source", model_type, **settings)
    with pytest.raises(UpcycleError, match=said) as caught:
        upcycle(source, target=tmp_path / "out" / "moe", progress=False, **{"to": "mixtral", **options})
    assert isinstance(caught.value, PopError)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quantised_source(tmp_path, llama):
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UpcycleError, match="quantised"):
        upcycle(llama, "mixtral", tmp_path / "moe", progress=False)


def test_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(SampleError, match="no such folder"):
        upcycle("./nowhere", "mixtral", tmp_path / "moe")
    with pytest.raises(SampleError, match="config of 'nobody/nothing' could not be loaded"):
        upcycle("nobody/nothing", "mixtral", tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_target_folder(tmp_path, llama):
    (tmp_path / "file").write_text("")
    with pytest.raises(UpcycleError, match="file is a file"):
        upcycle(llama, "mixtral", tmp_path / "file")
    with pytest.raises(UpcycleError, match="exists and is not empty"):
        upcycle(llama, "mixtral", llama)
    with pytest.raises(UpcycleError, match=r"could not be saved in .*moe"):
        upcycle(llama, "mixtral", tmp_path / "file" / "moe", progress=False)
    (tmp_path / "empty").mkdir()
    assert upcycle(llama, "mixtral", tmp_path / "empty", progress=False).path == tmp_path / "empty"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "empty").iterdir()
    }


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_save_leaves_nothing(tmp_path, llama, monkeypatch, stop):
    def half(self, folder):
        assert (folder / "model.safetensors").is_file()
        raise stop

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", half)
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else UpcycleError):
        upcycle(llama, "mixtral", tmp_path / "moe", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


# command and samples ------------------------------------------------------------------------------------------------


@pytest.fixture
def call(call, monkeypatch):
    monkeypatch.setattr(module, "TEXT", "w5 w9 w40 w7 w22")
    return lambda *arguments: call("models", "upcycle", *arguments)


def test_command(call, tmp_path, llama):
    made = tmp_path / "moe"
    code, out, err = call("--source", llama, "--to", "mixtral", "--experts", 3, "--top-k", 1, "--output", made)
    assert (code, err) == (0, "")
    path, parameters, difference = out.splitlines()
    assert path == str(made)
    assert re.fullmatch(r"[\d,]+ parameters, of which a token uses [\d,]+ \(the source has [\d,]+\)", parameters)
    largest = re.fullmatch(r"largest logit difference to the source (\S+), of logits up to (\S+)", difference)
    assert float(largest[1]) < 2e-5 < 0.1 < float(largest[2])
    config = json.loads((made / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 1)
    code, out, _ = call("--source", llama, "--to", "qwen2_moe", "--perturb", 0.5, "--output", tmp_path / "noisy")
    assert code == 0
    assert float(re.search(r"source (\S+), of", out)[1]) > 0.01


def test_command_with_a_vision_language_model(call, tmp_path):
    source = save_vlm(tmp_path / "source")
    code, out, err = call("--source", source, "--to", "qwen3_vl_moe", "--top-k", 1, "--output", tmp_path / "moe")
    assert (code, err) == (0, "")
    largest = re.search(r"source (\S+), of logits up to (\S+)", out)
    assert float(largest[1]) < 2e-5 < 0.1 < float(largest[2])


def test_command_ends_a_mistake_with_a_sentence_and_code_2(call, tmp_path, llama):
    for options in (("--to", "mixtrel"), ("--to", "mixtral", "--top-k", 9), ("--to", "mixtral", "--perturb", -1)):
        code, out, err = call("--source", llama, *options, "--output", tmp_path / "moe")
        assert (code, out) == (2, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
    assert call("--source", llama)[0] == 2


@pytest.mark.parametrize(("name", "to"), [("smollm2-mixtral", "mixtral"), ("smollm2-qwen2moe", "qwen2_moe")])
def test_samples(tmp_path, monkeypatch, name, to):
    base = Sample("smollm2-135m", "", "", lambda target, cache, report: save(target))
    monkeypatch.setitem(SAMPLES, "smollm2-135m", base)
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path))
    moe, tokenizer = load(name)
    assert moe.config.model_type == to
    assert (len(moe.model.layers[0].mlp.experts.down_proj), moe.config.num_experts_per_tok) == (4, 2)
    assert tokenizer("w5")["input_ids"] == [5]
    assert SAMPLES[name].name == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smollm2-135m-v1", fetch(name).name]
    assert logit_difference("smollm2-135m", name, "w5 w9 w40")[0] < 2e-5
