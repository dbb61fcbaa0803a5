"""Methods by name, and one that the library does not know: what it takes to write it, and that everything runs it."""

import json
from pathlib import Path

import pytest
import torch

from helpers.modes import EXPERT_LAYOUTS, MODES, RATIO, dense_run, pruned, with_experts
from helpers.observe import Active, prompt
from helpers.tiny_vlms import image_inputs, tiny_vlm
from pop_mm import ConfigError, prune
from pop_mm.evaluation import METHODS, config_for, score_texts
from pop_mm.methods import ChannelMethod, get_method, register_method, unregister_method
from pop_mm.partition import partition_sizes


class RandomSteps(ChannelMethod):
    """Of a tenth of the channels around the cut, each step keeps half by chance: a hash of channel and place."""

    name = "random_steps"
    about = "random candidates at each step, for a test"

    def sizes(self, channels, ratio, gamma, round_to=1):
        return partition_sizes(channels, ratio, 0.3, round_to)

    def step_scores(self, hidden, weight, channels, position):
        mixed = (channels * 7919 + position.unsqueeze(1) * 104729) % 65537
        return (mixed * 48271 % 65537).to(torch.float64)


@pytest.fixture(autouse=True)
def known():
    register_method(RandomSteps)
    yield
    unregister_method(RandomSteps.name)


def run(model, mode, backend, method="random_steps"):
    with pruned(model, backend, method=method) as session:
        tokens, logits = mode(model)
    return tokens, logits, session.report


def same(model, mode, **settings):
    """Masked and in place decode alike, and not as POP does."""
    masked, fast = (run(model, mode, backend, **settings) for backend in ("masked", "inplace"))
    assert {"masked"} == set(masked[2].backends) and "inplace" in fast[2].backends
    assert torch.equal(masked[0], fast[0])
    torch.testing.assert_close(masked[1], fast[1], rtol=0, atol=1e-5)
    assert not torch.equal(masked[1], run(model, mode, "masked", "pop")[1])


@pytest.mark.parametrize("mode", ["single", "greedy", "chunked", "assisted", "beams", "padded", "no_cache", "static"])
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "opt"])
def test_an_own_method_decodes_alike_on_every_executor(load, model_type, mode):
    same(load(model_type), MODES[mode][0])


@pytest.mark.parametrize("mode", ["single", "greedy", "assisted"])
@pytest.mark.parametrize("model_type", EXPERT_LAYOUTS)
def test_an_own_method_serves_experts(load, model_type, mode):
    model = with_experts(load, model_type)
    dense_run(mode, model)
    same(model, MODES[mode][0])


def test_an_own_method_serves_pictures():
    model = tiny_vlm("qwen2_5_vl", torch.float64)
    inputs = image_inputs("qwen2_5_vl", model)

    def mode(model):
        out = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
        return out.sequences, torch.stack(out.logits)

    same(model, mode)


def test_every_step_keeps_as_many_and_other_channels(model):
    with pruned(model, "inplace", method="random_steps") as session, Active(model) as seen:
        model.generate(prompt(1, 9), max_new_tokens=5)
    for ffn, forwards in zip(session.report.ffns, seen.seen, strict=True):
        steps = [step[0] for step in forwards[1:]]
        assert {int(step.sum()) for step in steps} == {ffn.plan.sizes.kept}
        assert len({tuple(step.tolist()) for step in steps}) > 1


def test_an_own_method_is_compared_by_its_name(model):
    assert METHODS["random_steps"] == RandomSteps.about
    ids = prompt(1, 24)
    own = score_texts(model, ids, 12, config_for("random_steps", 0.4, scope="ffn"))[0]
    pop = score_texts(model, ids, 12, config_for("pop", 0.4, scope="ffn"))[0]
    assert own.kl > 0 and own != pop


def test_an_own_method_is_timed_by_its_name(call, tmp_path):
    from helpers.tiny_folder import save

    folder, found = save(tmp_path / "model"), tmp_path / "speed.json"
    asked = ["--method", "random_steps", "--kernels", "stock", "--ratio", 0.2]
    code, _, errors = call(
        "bench", "--model", folder, *asked, "--rounds", 1, "--prompt", 8, "--new-tokens", 4, "--json", found
    )
    assert code == 0, errors
    assert "random_steps" in {row["method"] for row in json.loads(found.read_text())["rows"]}


@pytest.mark.parametrize("name", ["griffin", "magnitude", "random"])
def test_fixed_methods_are_for_everyone(model, name):
    found = [run(model, MODES["single"][0], backend, name) for backend in ("masked", "inplace")]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][2].to_dict()["config"]["method"] == name
    with prune(model, config_for(name, RATIO, scope="ffn")):
        assert torch.equal(MODES["single"][0](model)[0], found[0][0])


def test_the_example_of_the_page_decodes(model):
    page = (Path(__file__).parent.parent / "docs/methods.md").read_text()
    try:
        exec(page.split("```python\n")[1].split("```")[0], {})
        same(model, MODES["single"][0], method="loud_steps")
    finally:
        unregister_method("loud_steps")


def test_names_are_put_right():
    with pytest.raises(ConfigError, match="Did you mean 'static'"):
        get_method("statics")
    with pytest.raises(ConfigError, match="calibration text"):
        get_method("wanda_sp").sizes(8, 0.5, 0.1)
    with pytest.raises(ConfigError, match="exists"):
        register_method(RandomSteps)
