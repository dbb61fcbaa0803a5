"""What the plug-in does not take over it refuses at load: vLLM does not start, and nothing is served dense."""

import pytest
import torch
from serving import engine, save_llama
from torch import nn

from helpers.tiny_models import tiny
from pop_mm import PopConfig
from pop_mm.engines.vllm import runner
from pop_mm.engines.vllm.planned import Planned, plan_inputs
from pop_mm.errors import ConfigError, EngineError


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def clean():
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def refused(folder, settings, **vllm):
    with engine(folder, settings, **vllm):
        pass


def test_wrong_settings(llama):
    with pytest.raises(ConfigError, match="Did you mean 'ratio'"):
        refused(llama, {"ratoi": 0.3})
    with pytest.raises(ConfigError, match="every request has its own choice"):
        refused(llama, {"ratio": 0.3, "batch": "shared"})
    with pytest.raises(ConfigError, match="reads at least"):
        refused(llama, {"budget": 0.01, "method": "pop"})


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    tiny("mixtral", torch.float32, hidden_size=64, num_attention_heads=2, num_key_value_heads=2).save_pretrained(folder)
    return str(folder)


def test_routed_experts(mixtral):
    with pytest.raises(EngineError, match=r"does not prune MixtralForCausalLM in this engine: its routed experts"):
        refused(mixtral, {"ratio": 0.2}, max_model_len=128)


def test_routed_experts_that_no_plan_knows_are_found_in_vllms_model(mixtral, monkeypatch):
    monkeypatch.setattr(runner, "plan_inputs", lambda hf_config, config: Planned((), (), ()))
    with pytest.raises(EngineError, match=r"^model\.layers\.0\.\S*experts\S* is a \w*RoutedExperts: vLLM computes"):
        refused(mixtral, {"ratio": 0.2}, max_model_len=128)


def test_lora(llama):
    with pytest.raises(EngineError, match="LoRA"):
        refused(llama, {"ratio": 0.3}, enable_lora=True)


def test_a_runner_that_it_does_not_know(llama, monkeypatch):
    from vllm.v1.worker.cpu_worker import CPUWorker

    class Other:
        def load_model(self, **_):
            raise AssertionError("loaded")

    monkeypatch.setattr(CPUWorker, "init_device", lambda self: setattr(self, "model_runner", Other()))
    with pytest.raises(EngineError, match=r"runs test_vllm_refusals\.Other, which the plug-in does not know"):
        refused(llama, {"ratio": 0.3})


def test_a_version_that_it_does_not_know(monkeypatch):
    from pop_mm.engines.vllm import plugin, register

    def gone():
        raise AttributeError("WorkerWrapperBase has no attribute 'init_device'")

    monkeypatch.setattr(plugin, "install", gone)
    with pytest.raises(EngineError, match="does not know this version of vLLM"):
        register()


def test_weights_that_are_loaded_again(llama):
    with engine(llama, {"ratio": 0.3}) as llm, pytest.raises(EngineError, match="loaded again"):
        llm.collective_rpc("reload_weights")


class Layer(nn.Module):
    """Stands for a model of vLLM."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, make):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.Module()])
        self.model.layers[0].mlp = nn.Module()
        self.model.layers[0].mlp.down_proj = make("model.layers.0.mlp.down_proj")


@pytest.fixture
def world(llama):
    """vLLM's groups of processes, for modules outside a model."""
    with engine(llama, None) as llm:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(llm.llm_engine.vllm_config):
            yield


def test_modules_that_differ_from_the_plan(world):
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import ReplicatedLinear, RowParallelLinear

    from pop_mm.engines.vllm.takeover import take_over

    size, hidden = 64, 32
    config = PopConfig(ratio=0.3, scope="ffn", batch="per_sequence")
    model = tiny("llama", num_hidden_layers=1, intermediate_size=size, hidden_size=hidden)
    planned = plan_inputs(model.config, config)

    def attempt(make, norms=None, rename=None):
        model = Layer(make)
        if rename:
            mlp = model.model.layers[0].mlp
            mlp._modules[rename] = mlp._modules.pop("down_proj")
        before = [module.quant_method for module in model.modules() if hasattr(module, "quant_method")]
        try:
            return take_over(
                model, planned, config, norms or {}, print, lambda masked, module: module.quant_method.apply
            )
        except EngineError:
            assert before == [module.quant_method for module in model.modules() if hasattr(module, "quant_method")]
            raise

    def plain(name, width=size):
        return RowParallelLinear(width, hidden, bias=False, prefix=name)

    def quantised(name):
        module = plain(name)
        module.quant_method = object()
        return module

    class OwnExperts(RoutedExperts):
        def __init__(self):
            nn.Module.__init__(self)

    class FusedMoE(nn.Module):
        """Named as one of vLLM's, and none."""

    name = "model.layers.0.mlp.down_proj"
    assert [found.name for found in attempt(plain, {name: torch.ones(size)})] == [name]
    with pytest.raises(EngineError, match="has no counterpart in vLLM's Layer"):
        attempt(plain, rename="w2")
    with pytest.raises(EngineError, match="quantised, or wrapped"):
        attempt(quantised)
    with pytest.raises(EngineError, match="takes 80 inputs in vLLM and 64 in transformers"):
        attempt(lambda name: plain(name, 80))
    with pytest.raises(EngineError, match="is a ReplicatedLinear in vLLM"):
        attempt(lambda name: ReplicatedLinear(size, hidden, bias=False, prefix=name))
    with pytest.raises(EngineError, match="not one of its linear layers"):
        attempt(lambda name: nn.Linear(size, hidden))
    with pytest.raises(EngineError, match="norms are unknown"):
        attempt(plain)
    with pytest.raises(EngineError, match="computes routed experts in one kernel"):
        attempt(lambda name: OwnExperts())
    with pytest.raises(EngineError, match="not one of its linear layers"):
        attempt(lambda name: FusedMoE())
