"""What is of vLLM's V2 model runner alone; its tokens are compared in ``test_vllm_tokens.py``."""

import pytest
from serving import V2, answers, engine, in_transformers, prompts_of, save_llama

from pop_mm.errors import EngineError

pytestmark = pytest.mark.skipif(not V2, reason="make test-vllm runs this file with VLLM_USE_V2_MODEL_RUNNER=1")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


def test_a_model_state_that_it_does_not_know(llama, monkeypatch):
    from vllm.v1.worker.gpu import model_runner
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class OtherState(DefaultModelState):
        """A model's own."""

    monkeypatch.setattr(model_runner, "init_model_state", OtherState)
    refused = pytest.raises(EngineError, match="keeps its requests in a OtherState, which the plug-in does not know")
    with refused, engine(llama, {"ratio": 0.3}):
        pass


def test_what_was_held_of_requests_is_forgotten_with_them(llama):
    def held(worker):
        runner = worker.model_runner
        return len(runner.model_state._prompts), sum(len(masked._decided) for masked in runner.pop_mm.inputs)

    prompts = prompts_of(4)
    with engine(llama, {"ratio": 0.3}) as llm:
        found = answers(llm, prompts, 6)
        assert answers(llm, prompts[:1], 1) == [found[0][:1]]  # a step that tells of those that have ended
        assert llm.collective_rpc(held) == [(1, 0)]
    assert found == in_transformers(llama, {"ratio": 0.3}, prompts, 6)


def test_forwards_of_made_up_tokens_are_none_of_requests(llama):
    """vLLM runs them for memory and kernels, between those of requests too."""
    prompts = prompts_of(1)

    def made_up(worker):
        worker.model_runner._dummy_run(8)
        return worker.model_runner.pop_mm.tokens

    with engine(llama, {"budget": 0.6}) as llm:
        found = answers(llm, prompts, 6)
        assert llm.collective_rpc(made_up) == [None]
        assert answers(llm, prompts, 6) == found
