"""What test_tensor_parallel.py has several processes do: ``torchrun --nproc-per-node N tp_cases.py FOLDER``.

Each process saves what it saw as ``FOLDER/rankR.pt``. The test calls :func:`answers` in one process, and compares.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from pop_mm import Pop, prune
from pop_mm.errors import AdapterError, NonFiniteError, SessionError

TP, EP = {"tp_size": 3}, {"tp_size": 3, "ep_size": 3}
KINDS = {
    "llama": TP,
    "mixtral": TP,
    "mixtral, experts": EP,
    "qwen2_moe": TP,
}  # "model type, what else": how it is spread
SETTINGS = {
    "thresholds": {"budget": 0.6},
    "shard": {"ratio": 0.4},
    "global": {"ratio": 0.4, "method": Pop(tp_partition="global")},
    "global, a choice a row": {"ratio": 0.4, "method": Pop(tp_partition="global"), "batch": "per_sequence"},
    "global, partition": {"ratio": 0.4, "method": Pop(tp_partition="global", prefill="partition")},
    "budget 1": {"budget": 1},
    None: None,  # dense
}
PROMPT = torch.randint(3, 90, (2, 18), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(PROMPT).index_put((torch.tensor(1), torch.arange(7)), torch.tensor(0))  # the second is padded
_all_reduce = dist.all_reduce
_calls = []


def counted(*args, **kwargs):
    _calls.append(1)
    return _all_reduce(*args, **kwargs)


def session_of(model, settings):
    return nullcontext() if settings is None else prune(model, **settings)


def load(folder, name, how=None):
    spread = {} if how is None else {"distributed_config": DistributedConfig(**how)}
    folder = Path(folder, name.partition(",")[0])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager", **spread)


def greedy(model, **more):
    return model.generate(PROMPT, attention_mask=MASK, max_new_tokens=14, do_sample=False, pad_token_id=0, **more)


def chosen(session):
    """What the latest prompt chose: thresholds of every input, or R and C of every FFN."""
    if hasattr(session.report, "inputs"):
        return [list(found.thresholds) for found in session.report.inputs]
    return [(ffn.partition.retained, ffn.partition.candidates) for ffn in session.report.ffns]


@torch.no_grad()
def traffic(model, settings):
    """Sums over processes in a prompt's forward, in its first decode step and in its second."""
    with session_of(model, settings):
        done, cache, ids = [], None, PROMPT[:1]
        for _ in range(3):
            _calls.clear()
            out = model(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            done.append(len(_calls))
    return done


def answers(model, experts=False):
    """What a model says, and what was chosen, with each setting."""
    found = {}
    for name, settings in SETTINGS.items():
        with session_of(model, settings) as session:
            found[name] = {"tokens": greedy(model)}
            if settings and settings != {"budget": 1}:
                found[name]["chosen"] = chosen(session)
                found[name]["statistics"] = session.statistics()
                found[name]["sizes"] = [plan.to_dict() for plan in session.plans]
        if settings and name != "global, partition" and settings != {"budget": 1}:
            with session_of(model, settings) as session:
                found[name]["chunks"] = greedy(model, prefill_chunk_size=7)
                if not experts and "batch" not in settings:
                    with session.split(12), torch.no_grad():
                        found[name]["split"] = model(PROMPT[:1]).logits
    return found


def state(model):
    """What a session must leave as it was."""
    weights = {name: own(weight).clone() for name, weight in model.named_parameters()}
    calls = {
        name: (vars(m).get("forward"), len(m._forward_pre_hooks), len(m._forward_hooks), type(m))
        for name, m in model.named_modules()
    }
    return weights, {**calls, "experts": model.config._experts_implementation}


def own(weight):
    return weight.detach().to_local() if hasattr(weight, "to_local") else weight.detach()


def same(before, after):
    return before[1] == after[1] and all(torch.equal(weight, after[0][name]) for name, weight in before[0].items())


def error_of(call, kind):
    try:
        call()
    except kind as error:
        return str(error)
    return None


def report_of_one(model, rank):
    """A report before the first decode step, asked for by one process alone."""
    notes = {}
    for name in ("thresholds", "global"):
        with prune(model, **SETTINGS[name]) as session:
            model.generate(PROMPT[:1], max_new_tokens=1, do_sample=False, pad_token_id=0)
            notes[name] = str(session.report) if rank == 0 else ""
            model.generate(PROMPT[:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    return notes


def broken(model, rank):
    """What each process says where one of them alone has NaN in its channels."""
    weight = model.model.layers[-1].mlp.up_proj.weight.to_local()
    before = weight.detach().clone()
    if rank == 1:
        weight.data.fill_(torch.nan)
    said = {}
    for name in ("thresholds", "shard"):
        with prune(model, **SETTINGS[name]):
            said[name] = error_of(lambda: greedy(model), NonFiniteError)
    weight.data.copy_(before)
    return said


def refused(folder, name, how):
    model = load(folder, name, how)
    before = state(model)
    said = [error_of(lambda s=s: prune(model, **s).attach(), AdapterError) for s in ({"ratio": 0.4}, {"budget": 0.6})]
    assert same(before, state(model))
    return said


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.all_reduce = counted
    found = {}
    for name, how in KINDS.items():
        model = load(folder, name, how)
        rank = dist.get_rank()
        before = state(model)
        found[name] = answers(model, how is EP)
        found[name]["traffic"] = {key: traffic(model, SETTINGS[key]) for key in (None, "thresholds", "shard", "global")}
        if name == "llama":
            found["reports"] = report_of_one(model, rank)
            found["broken"] = broken(model, rank)
        if how is EP:
            with prune(model, ratio=0.4):
                found["with gradients"] = error_of(lambda m=model: m(PROMPT), SessionError)
            with prune(model, budget=0.6) as session, session.split(12), torch.no_grad():
                found["split"] = error_of(lambda m=model: m(PROMPT), SessionError)
        found[name]["restored"] = same(before, state(model))
    split = {"model.layers.*.mlp.down_proj": "rowwise_split_input"}
    found["another plan"] = refused(folder, "llama", {**TP, "tp_plan": split})
    found["sent away"] = refused(folder, "mixtral", {**EP, "ep_implementation": "all_to_all"})
    torch.save(found, Path(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
