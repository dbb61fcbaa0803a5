"""Models that transformers spreads over three processes, beside the same models in one: what is chosen, said and sent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.tiny_models import tiny
from helpers.tp_cases import KINDS, SETTINGS, answers, load

PROCESSES = 3
GLOBAL = [
    name for name, settings in SETTINGS.items() if settings and ("budget" in settings or "tp_partition" in settings)
]
CHANNELS = [kind for kind in KINDS if not kind.endswith("experts")]  # whose channels are spread
_WIDE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tiny models; the channels of the first do not come out even."""
    folder = tmp_path_factory.mktemp("models")
    tiny("llama", **_WIDE, intermediate_size=100).save_pretrained(folder / "llama")
    experts = {"num_local_experts": 6, "num_experts_per_tok": 2}
    tiny("mixtral", **_WIDE, **experts, intermediate_size=48).save_pretrained(folder / "mixtral")
    shared = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 30}  # one that every process has whole
    tiny("qwen2_moe", **_WIDE, **shared).save_pretrained(folder / "qwen2_moe")
    return folder


@pytest.fixture(scope="module")
def spread(folder):
    """What each of the processes saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(PROCESSES)]
    run = subprocess.run(
        [*command, Path(__file__).parent / "helpers" / "tp_cases.py", folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def one(folder):
    """What one process says."""
    return {name: answers(load(folder, name)) for name in {kind.partition(",")[0] for kind in KINDS}}


def of_one(one, kind):
    return one[kind.partition(",")[0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*GLOBAL, None])
def test_processes_together_say_what_one_process_says(spread, one, kind, name):
    alone = of_one(one, kind)[name]
    for process in spread:
        for what in ("tokens", "chunks"):
            assert what not in alone or process[kind][name][what].equal(alone[what])
        if "split" in process[kind][name]:
            torch.testing.assert_close(process[kind][name]["split"], alone["split"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_are_those_of_one_process(spread, one, kind):
    alone = of_one(one, kind)["thresholds"]["chosen"]
    for process in spread:
        for mine, wanted in zip(process[kind]["thresholds"]["chosen"], alone, strict=True):
            torch.testing.assert_close(
                mine, wanted, rtol=1e-3, atol=0
            )  # a number at the edge of a bin may be in the next


@pytest.mark.parametrize("kind", CHANNELS)
@pytest.mark.parametrize("name", [name for name in GLOBAL if name != "thresholds" and name != "budget 1"])
def test_processes_together_choose_the_channels_that_one_process_chooses(spread, one, kind, name):
    alone = of_one(one, kind)[name]["chosen"]
    for process in spread:
        for mine, wanted in zip(process[kind][name]["chosen"], alone, strict=True):
            assert all(part.equal(other) for part, other in zip(mine, wanted, strict=True))


def shards(process, kind):
    """By FFN, the channels of each process as sums of squares of the prompt, ``[U, D / 3]``."""
    return list(process[kind]["shard"]["statistics"].values())


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_each_process_has_a_share_of_the_statistics(spread, one, kind):
    for number, whole in enumerate(of_one(one, kind)["shard"]["statistics"].values()):
        parts = [shards(process, kind)[number] for process in spread]
        torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=1e-6, atol=1e-12)


def test_each_process_keeps_as_many_of_its_own_channels(spread, folder):
    down = [layer.mlp.down_proj.weight.detach() for layer in load(folder, "llama").model.layers]
    for layer, weight in enumerate(down):
        for process, columns in zip(spread, weight.tensor_split([34, 68], dim=1), strict=True):
            scores = columns.norm(dim=0) * shards(process, "llama")[layer].sqrt()
            found, plan = process["llama"]["shard"]["chosen"][layer], process["llama"]["shard"]["sizes"][layer]
            best = scores.topk(plan["retained"]).indices.sort().values
            assert found[0].equal(best) and plan["size"] == columns.shape[1]
            assert plan["kept"] == columns.shape[1] - int(plan["ffn_ratio"] * columns.shape[1])
    assert len({tuple(tuple(p["sizes"][0].items()) for p in [process["mixtral"]["shard"]]) for process in spread}) == 1


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_all_processes_say_the_same(spread, kind):
    for name in SETTINGS:
        tokens = [process[kind][name]["tokens"] for process in spread]
        assert all(said.equal(tokens[0]) for said in tokens)
    different = [
        not spread[0][kind]["shard"]["tokens"].equal(spread[0][kind][name]["tokens"]) for name in ("global", None)
    ]
    assert all(different)  # so that the tests above show something


def test_whole_experts_choose_alone_what_they_choose_in_one_process(spread, one):
    kind = "mixtral, experts"
    alone = of_one(one, kind)["shard"]
    for rank, process in enumerate(spread):
        assert process[kind]["shard"]["tokens"].equal(alone["tokens"])
        for mine, wanted in zip(process[kind]["shard"]["chosen"], alone["chosen"], strict=True):
            assert all(part.equal(other[2 * rank : 2 * rank + 2]) for part, other in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_send_nothing_for_the_choice_but_a_sum_a_layer_where_processes_choose_together(spread, kind):
    traffic = spread[0][kind]["traffic"]
    dense = traffic[None]
    extra = {name: [n - d for n, d in zip(sent, dense, strict=True)] for name, sent in traffic.items()}
    layers = {"llama": 2, "mixtral": 2, "qwen2_moe": 3}.get(kind, 0)
    # with the prompt a flag whether all is finite; with the first step what is chosen for the prompt
    assert extra["shard"] == [1, 0, 0]
    assert extra["thresholds"] == [1, 1, 0]
    assert extra["global"][0] == 1 and extra["global"][2] == layers
    if kind != "qwen2_moe":  # has kinds of FFNs, and experts that the first step reaches
        assert extra["global"][1] == layers + (1 if layers else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_what_it_was(spread, kind):
    assert all(process[kind]["restored"] for process in spread)


def test_nan_in_one_process_is_an_error_in_all(spread):
    for process in spread:
        assert "The activations of model.layers.1.mlp are NaN" in process["broken"]["shard"]
        assert "The activations of model.layers.1.mlp are NaN" in process["broken"]["thresholds"]


def test_one_process_may_ask_for_a_report(spread):
    assert all("spread over 3 processes" in text for text in spread[0]["reports"].values())


def test_what_cannot_be_followed_is_refused(spread):
    for process in spread:
        assert all(
            "down_proj as 'rowwise_split_input', which pop_mm does not know" in s for s in process["another plan"]
        )
        assert all("ep_implementation='all_to_all' sends tokens away" in said for said in process["sent away"])
        assert "under torch.no_grad()" in process["with gradients"]
        assert "with expert parallelism" in process["split"].replace("\n", " ")
