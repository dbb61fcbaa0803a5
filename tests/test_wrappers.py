"""What people hold instead of a model: pruned as the model in it is, or refused with what to pass."""

import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

from helpers.modes import EXPERT_LAYOUTS, STEPS, backends, fresh, generate, left_padded, pruned, with_experts
from helpers.observe import prompt, same_afterwards
from helpers.tiny_models import tiny
from pop_mm import AdapterError, prune
from pop_mm.adapters import LlamaAdapter, MixtralAdapter, adapter_for, check
from pop_mm.session.unwrap import unwrap

peft = pytest.importorskip("peft")
QV, Q = ["q_proj", "v_proj"], ["q_proj"]

# every tuner of peft whose layers can stand in attention, so that FFNs are the model's own
TUNERS = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=QV, total_step=10),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    "boft": lambda: peft.BOFTConfig(target_modules=QV, boft_block_size=8),
    "c3a": lambda: peft.C3AConfig(target_modules=QV, block_size=8),
    "dora": lambda: peft.LoraConfig(target_modules=QV, r=4, use_dora=True),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=QV, n_frequency=10),
    "hra": lambda: peft.HRAConfig(target_modules=QV),
    "ia3": lambda: peft.IA3Config(target_modules=QV, feedforward_modules=[]),
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(target_modules=QV),
    "lokr": lambda: peft.LoKrConfig(target_modules=QV),
    "lora": lambda: peft.LoraConfig(target_modules=QV, r=4),
    "miss": lambda: peft.MissConfig(target_modules=Q, r=4),
    "oft": lambda: peft.OFTConfig(target_modules=QV, oft_block_size=8, use_cayley_neumann=False),
    "randlora": lambda: peft.RandLoraConfig(target_modules=Q, r=4),
    "road": lambda: peft.RoadConfig(target_modules=QV, group_size=8),
    "shira": lambda: peft.ShiraConfig(target_modules=QV, r=2),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    "vblora": lambda: peft.VBLoRAConfig(target_modules=Q, vector_length=8, num_vectors=4),
    "vera": lambda: peft.VeraConfig(target_modules=Q),
}
NO_MERGE = {"adaption prompt"}
tuners = pytest.mark.parametrize("tuner", TUNERS)


def wrapped(model, tuner="lora", task_type="CAUSAL_LM"):
    """A peft model whose adapter is not the identity."""
    config = TUNERS[tuner]()
    config.task_type = task_type
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def twin(model):
    """The same function in a plain model, which shares nothing with it."""
    copy = pickle.loads(pickle.dumps(model))
    return copy.merge_and_unload().eval()


def of_peft(model, ids, steps=STEPS, **settings):
    """As ``modes.generate``: peft's own takes keywords alone."""
    out = model.generate(
        input_ids=ids, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **settings
    )
    return out.sequences[:, ids.shape[1] :], torch.stack([logits.double() for logits in out.logits])


@torch.no_grad()
def by_hand(model, ids):
    """Logits of a prefill and of two steps by plain forwards."""
    out = model(input_ids=ids, use_cache=True)
    found = [out.logits]
    for _ in range(2):
        out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1).double()


def attributes(model):
    """What instances hold, by identity: of the wrappers around a model."""
    return [
        {key: dict(value) if isinstance(value, dict) else value for key, value in vars(wrapper).items()}
        for wrapper in unwrap(model).wrappers
    ]


def same_attributes(before, after):
    return all(
        old.keys() == new.keys() and all(old[k] is new[k] or old[k] == new[k] for k in old)
        for old, new in zip(before, after, strict=True)
    )


# peft ---------------------------------------------------------------------------------------------------------------


@backends
@tuners
def test_a_peft_model_is_pruned_as_its_merged_twin(tuner, backend):
    model = wrapped(fresh(), tuner)
    base, ids = model.base_model.model, prompt(2, 9)
    dense = of_peft(model, ids)
    expected = base if tuner in NO_MERGE else twin(model)
    with pruned(expected, backend) as session:
        tokens, logits, plain = *generate(expected, ids), by_hand(expected, ids)
        steps = session.report.timings.decode_forwards
    before = attributes(model)
    with same_afterwards(base):
        with pruned(model, backend) as session:
            found = of_peft(model, ids)
            assert session.model is base
            assert torch.equal(found[0], tokens)
            close = dict(rtol=0, atol=1e-5 if tuner == "c3a" else 1e-9)  # C3A's transforms are in float32
            torch.testing.assert_close(found[1], logits, **close)
            torch.testing.assert_close(by_hand(model, ids), plain, **close)
            assert session.report.timings.decode_forwards == steps
            assert session.report.backends == {backend: 2}
        assert same_attributes(before, attributes(model))
    assert not torch.equal(found[1], dense[1])
    assert torch.equal(of_peft(model, ids)[1], dense[1])


@backends
@pytest.mark.parametrize("model_type", EXPERT_LAYOUTS)
def test_mixtures_in_a_peft_model(model_type, backend):
    model = with_experts(tiny, model_type)
    config = peft.LoraConfig(target_modules=Q, r=4, task_type="CAUSAL_LM")
    if not any(name.endswith("q_proj") for name, _ in model.named_modules()):
        config.target_modules = {"q_b_proj"}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    ids = prompt(2, 9)
    expected = twin(model)
    with pruned(expected, backend):
        tokens, logits = generate(expected, ids)
    with same_afterwards(model.base_model.model), pruned(model, backend):
        found = of_peft(model, ids)
    assert torch.equal(found[0], tokens)
    torch.testing.assert_close(found[1], logits, rtol=0, atol=1e-5 if model_type == "nemotron_h" else 1e-9)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "mixed"])
def test_every_class_of_peft_models(task_type):
    if task_type == "mixed":
        model = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=QV), mixed=True).eval()
    else:
        model = wrapped(fresh(), task_type=task_type)
    ids = prompt(1, 9)
    base = unwrap(model).model
    for given in (model, model.base_model):
        with pruned(given), torch.no_grad():
            found = of_peft(model, ids)[1], by_hand(model, ids)
        with pruned(base), torch.no_grad():
            expected = of_peft(base, ids)[1], by_hand(base, ids)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@backends
@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"prefill_chunk_size": 4}, {"use_cache": False}, {"do_sample": True, "top_k": 20}]
)
def test_every_mode_of_generate(settings, backend):
    model, ids = wrapped(fresh()), prompt(2, 9)
    base = unwrap(model).model
    with pruned(model, backend):
        torch.manual_seed(0)
        found = of_peft(model, ids, **settings)
    with pruned(base, backend):
        torch.manual_seed(0)
        expected = of_peft(base, ids, **settings)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_padded_batches_of_a_peft_model():
    model, (ids, mask) = wrapped(fresh()), left_padded(prompt(2, 9))
    with pruned(model, batch="per_sequence"):
        together = of_peft(model, ids, attention_mask=mask)
    for row in range(2):
        with pruned(model):
            alone = of_peft(model, ids[row : row + 1, mask[row].bool()])
        assert torch.equal(alone[0][0], together[0][row])


def test_what_a_forward_adds_to_the_loss_stays():
    model, ids = wrapped(fresh(), "adalora"), prompt(1, 9)
    with torch.no_grad():
        dense = model(input_ids=ids, labels=ids).loss
        with pruned(model):
            found = model(input_ids=ids, labels=ids).loss
    assert torch.equal(found, dense), "the prefill is dense, and the regulariser is still in it"


def test_a_peft_model_when_generate_raises():
    model, ids = wrapped(fresh()), prompt(1, 9)

    def stop(*_):
        raise KeyboardInterrupt

    before = attributes(model)
    with same_afterwards(unwrap(model).model):
        handle = model.base_model.model.lm_head.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt), pruned(model, "inplace"):
            of_peft(model, ids)
        handle.remove()
        model.base_model.prepare_inputs_for_generation = model.base_model_prepare_inputs_for_generation
        before[1]["prepare_inputs_for_generation"] = model.base_model_prepare_inputs_for_generation
        assert same_attributes(before, attributes(model))


@backends
def test_poly_takes_its_task_ids(backend):
    config = peft.PolyConfig(target_modules=QV, n_tasks=2, n_skills=2, task_type="CAUSAL_LM")
    model, ids, logits = peft.get_peft_model(fresh(), config).eval(), prompt(1, 9), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "poly_" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    for task in (0, 1):
        tasks = {"task_ids": torch.tensor([task])}
        with pruned(model, backend) as session, torch.no_grad():
            logits.append(of_peft(model, ids, **tasks)[1])
            out = model(input_ids=ids, use_cache=True, **tasks)
            torch.testing.assert_close(out.logits[:, -1], logits[-1][0], rtol=0, atol=1e-5)  # norms are in float32
            step = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, **tasks)
            torch.testing.assert_close(step.logits[:, -1], logits[-1][1], rtol=0, atol=1e-5)
            assert session.report.timings.decode_forwards == STEPS
    assert not torch.equal(*logits)


def test_x_lora_is_refused_by_name(tmp_path):
    lora = peft.get_peft_model(fresh(), peft.LoraConfig(target_modules=QV, task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)})
    base = fresh()
    base.config.use_cache = False  # X-LoRA asks for it
    model = peft.get_peft_model(base, config).eval()
    with pytest.raises(
        AdapterError, match=r"is X-LoRA, which runs the model twice for every step.*single LoRA adapter"
    ):
        prune(model, 0.4)


PROMPTS = {
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "CPT": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]
    ),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompt_learning_is_refused_by_name(kind):
    model = peft.get_peft_model(fresh(), PROMPTS[kind]()).eval()
    for use in (lambda: prune(model, 0.4), lambda: adapter_for(model), lambda: check(model)):
        with pytest.raises(
            AdapterError, match=rf"prompt learning \({kind}\).*prune\(model\.get_base_model\(\)\).*LoRA"
        ):
            use()
    prune(model.get_base_model(), 0.4)


# torch.compile, accelerate ------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("traced_before", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_a_compiled_model_is_pruned_as_the_model_in_it(model_type, traced_before, backend):
    model, ids = tiny(model_type, torch.float64), prompt(2, 9)
    compiled = torch.compile(model, backend="eager")
    if traced_before:
        with torch.no_grad():
            compiled(input_ids=ids)
    with pruned(model, backend):
        expected = *generate(model, ids), by_hand(model, ids)
    before = attributes(compiled)
    with same_afterwards(model):
        with pruned(compiled, backend) as session:
            found = *generate(compiled, ids), by_hand(compiled, ids)
            assert session.model is model
        assert same_attributes(before, attributes(compiled))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_wrappers_in_wrappers():
    model = wrapped(fresh())
    compiled, ids = torch.compile(model, backend="eager"), prompt(1, 9)
    with pruned(model):
        expected = by_hand(model, ids)
    before = attributes(compiled)
    with pruned(compiled):
        assert torch.equal(by_hand(compiled, ids), expected)
    assert same_attributes(before, attributes(compiled))
    assert [type(w).__name__ for w in unwrap(compiled).wrappers] == [
        "OptimizedModule",
        "PeftModelForCausalLM",
        "LoraModel",
    ]


def test_adapters_are_those_of_the_model_inside():
    model = fresh()
    for thing in (torch.compile(model), wrapped(model), torch.compile(wrapped(fresh()))):
        assert type(adapter_for(thing)) is LlamaAdapter
        found = check(thing)
        assert found.ok and found.model == "LlamaForCausalLM" and found.groups[0].pattern == "model.layers.{0-1}.mlp"
    assert type(adapter_for(torch.compile(tiny("mixtral")))) is MixtralAdapter


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_a_model_that_accelerate_dispatches(model_type, second, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = tiny(model_type, torch.float64), prompt(1, 9)
    with pruned(model):
        expected = generate(model, ids)
    model = tiny(model_type, torch.float64)
    places = {"model.layers.0": "cpu", "model.layers.1": second}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True, offload_buffers=False
    )
    found = check(model)
    assert found.ok and all(group.not_probed is None for group in found.groups)
    with pruned(model):
        tokens, logits = generate(model, ids)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(logits, expected[1], rtol=0, atol=1e-9)


# what is no model, or not as a whole --------------------------------------------------------------------------------


def pipeline():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TextGenerationPipeline

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    return TextGenerationPipeline(model=tiny("llama"), tokenizer=words)


def distributed(model):
    """As DistributedDataParallel is, without a process group."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


REFUSED = {
    "None": (lambda: None, "got None. Pass the model"),
    "a class": (lambda: type(tiny("llama")), r"got the class LlamaForCausalLM\. Pass an instance"),
    "a name": (lambda: "smollm2-135m", r"not a name; got 'smollm2-135m'\. Pass AutoModelForCausalLM"),
    "a number": (lambda: 3, "prunes transformers models; got int 3"),
    "a config": (lambda: tiny("llama").config, r"LlamaConfig is a config, not a model\. Load the model"),
    "a pipeline": (pipeline, r"TextGenerationPipeline is a pipeline, not a model\. Pass pipe\.model"),
    "a tokenizer": (lambda: pipeline().tokenizer, "is a tokenizer, not a model. Pass the model"),
    "data parallel": (lambda: nn.DataParallel(tiny("llama")), r"DataParallel runs copies.*Pass model\.module"),
    "distributed": (lambda: distributed(tiny("llama")), r"DistributedDataParallel runs copies.*Pass model\.module"),
    "compiled in parallel": (lambda: torch.compile(nn.DataParallel(tiny("llama"))), r"Pass model\.module"),
    "another module": (lambda: nn.Linear(2, 2), "config with a model_type; got Linear"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_model_is_refused_by_name(kind):
    make, message = REFUSED[kind]
    thing = make()
    for use in (lambda: prune(thing, 0.4), lambda: adapter_for(thing), lambda: check(thing)):
        with pytest.raises(AdapterError, match=message):
            use()


@pytest.fixture
def one_process():
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model, mesh, name):
    owner, _, weight = name.rpartition(".")
    owner = model.get_submodule(owner)
    setattr(owner, weight, nn.Parameter(distribute_tensor(getattr(owner, weight).detach(), mesh, [Shard(0)])))


@pytest.mark.parametrize(
    ("model_type", "kind", "weight", "said"),
    [
        ("llama", "tp", "model.layers.1.mlp.up_proj.weight", "tensor parallelism, tp_size=2"),
        ("mixtral", "ep", "model.layers.0.mlp.experts.down_proj", "expert parallelism, ep_size=2"),
        ("llama", "fsdp", "lm_head.weight", "FSDP, fsdp_size=2"),
        ("llama", "pp", None, "pipeline parallelism, pp_size=2"),
    ],
)
@pytest.mark.parametrize("settings", [{"budget": 0.65}, {"ratio": 0.3}, {"budget": 1}], ids=str)
def test_a_model_that_is_spread_over_processes_is_refused_by_name(
    one_process, model_type, kind, weight, said, settings
):
    model = tiny(model_type)
    model.config.distributed_config = SimpleNamespace(**{f"{kind}_size": 2})  # as transformers notes it
    if weight is None:
        model.model.layers[1] = PipelineIdentityLayer()
        found = "model.layers.1 is another process's"
    else:
        shard(model, init_device_mesh("cpu", (1,)), weight)
        found = f"the weight {weight} is a shard"
    with same_afterwards(model), pytest.raises(AdapterError, match=f"spread over processes .{said}.: {found}"):
        prune(model, **settings)


def test_processors_are_refused_by_name():
    from transformers import ProcessorMixin

    class AnyProcessor(ProcessorMixin):
        def __init__(self):
            pass

    with pytest.raises(AdapterError, match=r"AnyProcessor is a processor, not a model\. Pass the model"):
        prune(AnyProcessor(), 0.4)


@backends
def test_a_pipeline_goes_on_with_its_model_pruned(backend):
    pipe = pipeline()
    dense = pipe("a a a", max_new_tokens=4, return_tensors=True)
    with pruned(pipe.model, backend) as session:
        pipe("a a a", max_new_tokens=4, return_tensors=True)
        assert session.report.timings.decode_forwards == 3
    assert pipe("a a a", max_new_tokens=4, return_tensors=True) == dense


@backends
def test_a_decoder_without_a_head(backend):
    model, ids = fresh(), prompt(1, 9)
    with pruned(model, backend), torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=cache).logits
    with pruned(model.model, backend), torch.no_grad():
        cache = model.model(ids, use_cache=True).past_key_values
        hidden = model.model(ids[:, :1], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), expected, rtol=0, atol=1e-9)
    assert check(model.model).ok


def test_importing_pop_mm_loads_no_package_of_wrappers():
    import subprocess
    import sys

    script = "import sys, pop_mm.session.unwrap as u\ntry: u.unwrap(3)\nexcept u.AdapterError: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"peft", "accelerate", "transformers"} & set(done.stdout.split())
