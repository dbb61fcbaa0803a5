"""Routed experts against the slow reference, experts that the prompt does not reach, and what users report of such tools."""

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from helpers.covering import covers
from helpers.modes import (
    BACKENDS,
    EXPERT_LAYOUTS,
    IMPLEMENTATIONS,
    RATIO,
    STEPS,
    backends,
    expert_cases,
    expert_layouts,
    generate,
    implementations,
    in_turn,
    left_padded,
    pruned,
    with_experts,
)
from helpers.observe import (
    Active,
    ActiveExperts,
    InDouble,
    of_dense,
    of_experts,
    partitions,
    prompt,
    same_afterwards,
)
from helpers.reference import counts
from helpers.reference_moe import MoEPop, experts_of, split_sizes
from helpers.tiny_models import MOE_MODELS, tiny
from pop_mm import AdapterError, ConfigError, NonFiniteError, SessionError
from pop_mm.adapters import Adapter, ExpertPaths, FFNPaths

GAMMA = 0.3  # a width of 19 of 24 channels, so that rounding it up shows


def check_state(session, reference):
    """The session's partitions and counts are the reference's."""
    assert of_dense(session) == reference.parts
    for index, ffn in enumerate(of_experts(session)):
        p, count = ffn.partition, len(reference.weights[index])
        found = [
            tuple(map(set, unit))
            for unit in zip(p.retained.tolist(), p.candidates.tolist(), p.pruned.tolist(), strict=True)
        ]
        units = reference.units[index]
        assert {unit: found[unit[0] * count + unit[1]] for unit in units} == units
        late = reference.late[index]
        assert ffn.experts.partitioned == sorted({expert for _, expert in units.keys() - late})
        assert ffn.experts.late == sorted({expert for _, expert in late})
        rows = len(found) // count
        every = {(row, expert) for row in range(rows) for expert in range(count)}
        assert ffn.experts.dense == sorted({expert for _, expert in every - units.keys()})
        assert ffn.experts.prompt_tokens == reference.prompt_tokens[index]
        assert ffn.experts.decode_tokens == reference.decode_tokens[index]
        assert ffn.experts.dense_tokens == reference.dense_tokens[index]


def check(model, backend, ids, mask=None, steps=STEPS, here=None, **settings):
    """Greedy generation equals the reference's: tokens, logits, partitions, and the active channels of every token."""
    settings = {"gamma": GAMMA, **settings}
    with InDouble(), MoEPop(model, RATIO, **settings) as reference:
        expected = reference.greedy(ids, steps, mask=mask)
    more = {} if mask is None else {"attention_mask": mask}
    with InDouble(), pruned(model, backend, **settings) as session, ActiveExperts(model) as seen:
        tokens, logits = generate(model, ids, steps, **more)
    assert torch.equal(tokens, expected[:, ids.shape[1] :])
    close = 1e-9 if model.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(logits, torch.stack(reference.logits), rtol=0, atol=close)
    check_state(session, reference)
    gone = (
        set() if here is None else set(range(4)) - set(here)
    )  # one kernel computes absent experts, for a weight of zero
    found = [[{e: t for e, t in module.items() if e not in gone} for module in forward] for forward in seen.seen]
    assert found == reference.expert_active
    return session, reference


# against the reference --------------------------------------------------------------------------------------------------


@expert_cases
def test_greedy_equals_the_reference(load, model_type, implementation, backend):
    model = with_experts(load, model_type, implementation)
    session, reference = check(model, backend, prompt(2, 7))
    assert set(session.report.backends) == {backend}
    assert sum(len(units) for units in reference.units) == 4 * len(reference.units), "every expert was reached"
    for ffn in of_experts(session):
        sizes = ffn.plan.sizes
        expected = split_sizes(24, RATIO, GAMMA, round_to=16 // model.dtype.itemsize)
        assert (sizes.retained, sizes.candidates, sizes.candidates_kept) == expected
        assert sizes.width % (16 // model.dtype.itemsize) == 0
        assert ffn.active_per_step == sizes.kept == 15


@expert_cases
def test_experts_that_the_prompt_hardly_reaches(load, model_type, implementation, backend):
    model = with_experts(load, model_type, implementation)
    _, reference = check(model, backend, prompt(1, 2, seed=3), min_tokens=2, steps=8)
    assert sum(map(sum, reference.dense_tokens)) and any(reference.late)


SETTINGS = {
    "partition": {"prefill": "partition"},
    "partition, late": {"prefill": "partition", "min_tokens": 4},
    "static": {"method": "static"},
    "full": {"method": "full"},
    "unseen by weights": {"unseen": "weights", "min_tokens": 3},
    "routed": {"expert_score": "routed"},
    "routed, late": {"expert_score": "routed", "min_tokens": 4},
    "never enough tokens": {"min_tokens": 100},
}


# what a setting does is no layout's matter: each on one backend without a shared expert, on the other with one
@pytest.mark.parametrize(
    ("model_type", "setting", "backend"),
    [
        (*case, BACKENDS[(place + place // len(SETTINGS)) % len(BACKENDS)])
        for place, case in enumerate(in_turn(EXPERT_LAYOUTS, ("mixtral", "qwen2_moe"), SETTINGS))
    ],
)
def test_every_setting_equals_the_reference(load, model_type, setting, backend):
    model = with_experts(load, model_type)
    check(model, backend, prompt(2, 3), steps=4, **SETTINGS[setting])


@expert_layouts
@implementations
def test_per_sequence_equals_the_reference(load, model_type, implementation):
    model = with_experts(load, model_type, implementation)
    check(model, "masked", prompt(2, 4), batch="per_sequence", min_tokens=2)


@expert_cases
def test_left_padding_equals_the_reference(load, model_type, implementation, backend):
    model = with_experts(load, model_type, implementation)
    ids, mask = left_padded(prompt(2, 6), pads=(4, 0))
    check(model, backend, ids, mask, min_tokens=4)
    if backend == "masked":
        check(model, backend, ids, mask, min_tokens=3, batch="per_sequence")


@backends
def test_a_row_that_ends_early_counts_no_more(load, backend):
    model = with_experts(load, "mixtral")
    ids = prompt(2, 5)
    with pruned(model, backend, min_tokens=4):
        free = generate(model, ids, 8)[0]
    eos = int(free[0, 1])
    assert eos not in free[1]
    with InDouble(), MoEPop(model, RATIO, min_tokens=4) as reference:
        expected = reference.greedy(ids, 8, eos=eos)
    with InDouble(), pruned(model, backend, min_tokens=4) as session:
        found = model.generate(ids, max_new_tokens=8, eos_token_id=eos, pad_token_id=0)
    assert (found[0, 8:] == 0).all(), "no row ended early"
    assert torch.equal(found, expected[:, : found.shape[1]])
    check_state(session, reference)


@backends
@implementations
def test_split_equals_decode_step_by_step(load, backend, implementation):
    model, ids, context = with_experts(load, "qwen2_moe", implementation), prompt(2, 9), 3
    with InDouble(), MoEPop(model, RATIO, min_tokens=3) as reference:
        expected = [reference.prefill(ids[:, :context])]
        expected += [reference.step(ids[:, column : column + 1]) for column in range(context, ids.shape[1])]
    for use_cache in (True, False):
        with InDouble(), pruned(model, backend, min_tokens=3) as session, session.split(context), torch.no_grad():
            found = model(ids, use_cache=use_cache).logits
        close = 1e-9 if implementation != "grouped_mm" else 1e-4
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=0, atol=close)
        check_state(session, reference)


@torch.no_grad()
def test_split_by_a_tensor_gives_each_row_its_own_context(load):
    model, ids, contexts = with_experts(load, "qwen2_moe"), prompt(2, 9), [3, 6]
    expected = []
    for row, context in enumerate(contexts):
        with InDouble(), MoEPop(model, RATIO, min_tokens=3) as reference:
            own = ids[row : row + 1]
            steps = [reference.prefill(own[:, :context])]
            steps += [reference.step(own[:, column : column + 1]) for column in range(context, ids.shape[1])]
            expected.append(torch.cat(steps, 1))
    with (
        InDouble(),
        pruned(model, batch="per_sequence", min_tokens=3) as session,
        session.split(torch.tensor(contexts)),
    ):
        found = model(ids).logits
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-9)


@backends
@torch.no_grad()
def test_a_second_turn_equals_the_reference(load, backend):
    model, turns = with_experts(load, "deepseek_v3"), (prompt(1, 3), prompt(1, 2, seed=1))
    with InDouble(), MoEPop(model, RATIO, min_tokens=4) as reference:
        for ids in turns:
            logits = [reference.prefill(ids)[:, -1]]
            for _ in range(3):
                logits.append(reference.step(logits[-1].argmax(-1, keepdim=True))[:, -1])
    cache = None
    with InDouble(), pruned(model, backend, min_tokens=4) as session:
        for ids in turns:
            out = model(ids, past_key_values=cache, use_cache=True)
            found, cache = [out.logits[:, -1]], out.past_key_values
            for _ in range(3):
                found.append(model(found[-1].argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1])
        check_state(session, reference)
    torch.testing.assert_close(torch.stack(found), torch.stack(logits), rtol=0, atol=1e-9)


# experts without a partition --------------------------------------------------------------------------------------------


@expert_cases
def test_experts_without_a_prompt_token_are_listed_and_never_count_as_pruned(load, model_type, implementation, backend):
    model = with_experts(load, model_type, implementation)
    with pruned(model, backend) as session:
        model.generate(prompt(1, 1, seed=1), max_new_tokens=2)
        report = session.report
    for ffn in of_experts(session):
        routing, kept, size = ffn.experts, ffn.plan.sizes.kept, ffn.plan.sizes.channels
        assert routing.partitioned == [e for e, tokens in enumerate(routing.prompt_tokens) if tokens]
        assert len(routing.partitioned) == 2
        assert sorted(routing.partitioned + routing.late + routing.dense) == list(range(4))
        assert not set(routing.late) & {e for e, tokens in enumerate(routing.prompt_tokens) if tokens}
        assert all(routing.decode_tokens[e] for e in routing.late)
        assert sum(routing.decode_tokens) == 2
        assert sum(routing.dense_tokens) == len(routing.late)
        dense = sum(routing.dense_tokens)
        assert ffn.active_per_step == (kept * (2 - dense) + size * dense) / 2
    assert any(ffn.experts.dense for ffn in of_experts(session))
    rows = json.loads(report.to_json())["ffns"]
    assert [row["routing"]["dense"] for row in rows if row["role"] == "expert"] == [
        f.experts.dense for f in of_experts(session)
    ]
    assert "experts" in str(report)


def test_a_session_reports_experts_before_their_first_token(load):
    model = with_experts(load, "mixtral")
    with pruned(model) as session:
        for ffn in of_experts(session):
            assert ffn.partition is None and ffn.active_per_step is None
        str(session.report)
        with torch.no_grad():
            model(prompt(1, 1))
        for ffn in of_experts(session):
            assert ffn.active_per_step is None
            assert len(ffn.experts.dense) == len(ffn.experts.partitioned) == 2
        str(session.report)


def test_a_report_shows_experts_without_a_partition(load, tmp_path):
    model = with_experts(load, "deepseek_v3")
    with pruned(model, min_tokens=5) as session:
        model.generate(prompt(1, 1), max_new_tokens=2)
    assert session.report.plot(tmp_path / "channels.png").stat().st_size


def test_by_weights_experts_without_a_token_are_partitioned_too(load):
    model = with_experts(load, "mixtral")
    with pruned(model, unseen="weights") as session, ActiveExperts(model) as seen:
        model.generate(prompt(1, 1), max_new_tokens=6)
    for index, ffn in enumerate(of_experts(session)):
        assert not ffn.experts.dense and not ffn.experts.late and not sum(ffn.experts.dense_tokens)
        for forward in seen.seen[1:]:
            assert {len(channels) for tokens in forward[index].values() for channels in tokens} == {ffn.plan.sizes.kept}


@backends
def test_activations_that_are_not_finite_are_an_error_that_names_the_experts(load, backend):
    model = tiny("mixtral", torch.float64)
    name, module = next((n, m) for n, m in model.named_modules() if hasattr(m, "is_concatenated"))
    with torch.no_grad():
        module.gate_up_proj[:, 0] = float("inf")
    with pruned(model, backend), pytest.raises(NonFiniteError, match=name):
        model.generate(prompt(), max_new_tokens=2)


# what users report of tools for mixtures of experts ---------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MOE_MODELS)
def test_fused_experts_are_never_silently_skipped(load, model_type):
    model = with_experts(load, model_type)
    modules = {id(module) for module in experts_of(model)}
    assert modules
    with pruned(model) as session, ActiveExperts(model) as seen:
        model.generate(prompt(1, 9), max_new_tokens=3)
    planned = {id(plan.ffn.module) for plan in session.plans if plan.ffn.role == "expert"}
    assert planned == modules
    kept = 24 - int(24 * RATIO)
    for index, ffn in enumerate(of_experts(session)):
        parted = ffn.experts.partitioned
        found = [len(channels) for forward in seen.seen[1:] for e in parted for channels in forward[index].get(e, [])]
        assert found and max(found) == kept, "an expert with a partition ran dense in a decode step"


def test_an_adapter_that_misses_the_experts_is_an_error(load):
    class WithoutExperts(Adapter):
        ffns = (FFNPaths("mlp.shared_expert"), FFNPaths())

    model = with_experts(load, "qwen2_moe")
    with pytest.raises(AdapterError, match="experts"):
        pruned_by(WithoutExperts(), model)


def pruned_by(adapter, model):
    from pop_mm import PopConfig, prune

    return prune(model, PopConfig(RATIO, scope="ffn"), adapter=adapter)


def test_success_is_never_reported_on_a_model_without_experts(load):
    class OnlyExperts(Adapter):
        experts = (ExpertPaths(),)

    with same_afterwards(load("llama")), pytest.raises(AdapterError, match="nothing can be pruned"):
        pruned_by(OnlyExperts(), load("llama"))
    dense = tiny("qwen2_moe", torch.float64, mlp_only_layers=[0, 1, 2])
    with pytest.raises(AdapterError, match="nothing can be pruned"):
        pruned_by(OnlyExperts(), dense)
    with pruned(dense) as session:  # its own adapter knows the dense FFNs, and says that they are
        dense.generate(prompt(), max_new_tokens=2)
        assert {ffn.plan.ffn.role for ffn in session.report.ffns} == {"dense"}
        assert all(ffn.experts is None for ffn in session.report.ffns)


@expert_cases
def test_widths_are_never_uneven(load, model_type, implementation, backend):
    model = with_experts(load, model_type, implementation)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pruned(model, backend, ratio=0.37, gamma=0.27) as session:
        model.generate(prompt(2, 9), max_new_tokens=3)
        inside = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes
    assert inside.items() <= shapes.items()
    widths = set()
    for ffn in of_experts(session):
        p = ffn.partition
        assert p.retained.shape[0] == p.candidates.shape[0] == p.pruned.shape[0] == 4
        widths.add(p.retained.shape[1] + p.candidates.shape[1])
        assert torch.cat([p.retained, p.candidates, p.pruned], 1).sort(1).values.tolist() == [list(range(24))] * 4
    assert len(widths) == 1
    assert widths.pop() % (16 // model.dtype.itemsize) == 0


@backends
@implementations
def test_no_bias_is_forgotten(load, implementation, backend):
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    model = tiny("gpt_oss", dtype, experts_implementation=implementation)
    biases = [name for name, _ in model.named_parameters() if "experts" in name and name.endswith("bias")]
    assert len(biases) == 4
    with torch.no_grad():
        for name in biases:
            model.get_parameter(name).mul_(5)
    with same_afterwards(model):
        check(model, backend, prompt(2, 4))
        with pruned(model, backend) as session:
            model.generate(prompt(2, 4), max_new_tokens=3)
            for plan in session.plans:
                for expert in range(4):  # the bias of a channel stays with its weights
                    now, own = [moved(plan.ffn.module, expert) for _ in range(2)]
                    assert now == own
            inside = [channels_of(plan.ffn.module) for plan in session.plans]
    assert inside == [channels_of(plan.ffn.module) for plan in session.plans]


def moved(module, expert):
    return channels_of(module)[expert]


def channels_of(module):
    """For each expert, all that belongs to one channel, in no order."""
    found = []
    for expert in range(len(module.down_proj)):
        gate_up, bias = module.gate_up_proj[expert].detach(), module.gate_up_proj_bias[expert].detach()
        own = [gate_up[:, ::2].t(), gate_up[:, 1::2].t(), bias[::2, None], bias[1::2, None], module.down_proj[expert]]
        found.append({row.detach().numpy().tobytes() for row in torch.cat(own, 1)})
    return found


@contextmanager
def routing(model):
    """What every router said, and what its experts got."""
    said, got, hooks = [], [], []
    for module in experts_of(model):
        hooks.append(module.register_forward_pre_hook(lambda _, args: got.append((args[1].clone(), args[2].clone()))))
    for _, module in model.named_modules():
        if "Router" in type(module).__name__:
            hooks.append(module.register_forward_hook(lambda _, __, out: said.append(out)))
    try:
        yield said, got
    finally:
        for hook in hooks:
            hook.remove()


@expert_cases
def test_the_router_is_unchanged(load, model_type, implementation, backend):
    model = with_experts(load, model_type, implementation)
    ids = prompt(2, 9)
    with routing(model) as (_, dense), torch.no_grad():
        model(ids)
    with pruned(model, backend), routing(model) as (said, got):
        model.generate(ids, max_new_tokens=4)
    for (choice, weights), (dense_choice, dense_weights) in zip(got, dense, strict=False):
        assert torch.equal(choice, dense_choice)
        torch.testing.assert_close(weights, dense_weights, rtol=0, atol=1e-5)  # sums run in another order
    assert len(got) == 4 * len(dense)
    assert len(said) in (0, len(got))
    for out, (choice, weights) in zip(said, got, strict=False):  # in decode steps too
        assert any(torch.equal(o, choice) for o in out)
        assert any(o.shape == weights.shape and torch.equal(o, weights) for o in out)


@backends
@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "nemotron_h", "aria_text"])
def test_a_shared_expert_is_pruned_once(load, model_type, backend):
    model = with_experts(load, model_type)
    with pruned(model, backend) as session, Active(model) as seen:
        model.generate(prompt(1, 9), max_new_tokens=3)
    modules = [module for plan in session.plans for module in plan.ffn.modules]
    assert len(modules) == len(set(map(id, modules)))
    dense = [ffn for ffn in session.report.ffns if ffn.plan.ffn.role != "expert"]
    assert "shared_expert" in {ffn.plan.ffn.role for ffn in dense}
    for ffn, forwards in zip(dense, seen.seen, strict=True):
        kept = counts(ffn.plan.ffn.size, RATIO, 0.1)[2]
        assert [int(active.sum()) for active in forwards[1:]] == [kept] * 2


@backends
def test_a_shared_expert_can_stay_whole(load, backend):
    model = with_experts(load, "qwen2_moe")
    with pruned(model, backend, prune_shared=False) as session, Active(model) as seen:
        model.generate(prompt(1, 9), max_new_tokens=3)
    dense = [ffn for ffn in session.report.ffns if ffn.plan.ffn.role != "expert"]
    for ffn, forwards in zip(dense, seen.seen, strict=True):
        whole = ffn.plan.ffn.role == "shared_expert"
        size = ffn.plan.ffn.size
        assert [int(a.sum()) for a in forwards[1:]] == [size if whole else counts(size, RATIO, 0.1)[2]] * 2
        assert (ffn.plan.backend == "dense") == whole
    assert {ffn.plan.backend for ffn in of_experts(session)} == {backend}


@backends
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_the_config_is_left_as_it_was(load, implementation, backend):
    model = tiny("mixtral")
    model.config._experts_implementation_internal = implementation
    with same_afterwards(model):
        before = model.get_experts_implementation(), vars(copy.deepcopy(model.config))
        with pruned(model, backend):
            model.generate(prompt(), max_new_tokens=2)
        assert model.get_experts_implementation() == before[0]
        with pytest.raises(RuntimeError, match="on purpose"), pruned(model, backend):
            raise RuntimeError("on purpose")
        assert model.get_experts_implementation() == before[0]
        with pruned(model, backend, ratio=0.0):
            assert model.get_experts_implementation() == before[0], "nothing is pruned, so nothing is taken over"


@backends
def test_the_config_is_left_as_it_was_when_attaching_fails(backend):
    model = tiny("nemotron_h", torch.float64)
    module = experts_of(model)[-1]
    activation = module.act_fn
    del module.act_fn
    module.act_fn = activation.forward  # a function, as some models have it
    expected = generate(model, prompt())
    with same_afterwards(model):
        try:
            with pruned(model, backend):
                found = generate(model, prompt())
        except Exception:
            assert model.get_experts_implementation()[""] == "eager"
        else:
            assert not torch.equal(found[1], expected[1])


def test_a_gate_that_somebody_replaced_is_given_back(load):
    model = tiny("mixtral", torch.float64)
    module = experts_of(model)[0]
    own = type(module)._apply_gate
    module._apply_gate = lambda gate_up: 2 * own(module, gate_up)
    with same_afterwards(model), pruned(model):
        model.generate(prompt(), max_new_tokens=2)


# experts on another device ----------------------------------------------------------------------------------------------


@contextmanager
def elsewhere(model, gone):
    """As under expert parallelism: routes to ``gone`` experts carry the number past the last one, and no weight."""
    modules, hooks = experts_of(model), []

    def rerouted(module, args):
        hidden, ids, weights = args
        away = torch.isin(ids, torch.tensor(gone))
        return hidden, ids.masked_fill(away, len(module.down_proj)), weights.masked_fill(away, 0)

    for module in modules:
        hooks.append(module.register_forward_pre_hook(rerouted))
        module._is_expert_parallel = True
    try:
        yield
    finally:
        for module, hook in zip(modules, hooks, strict=True):
            module._is_expert_parallel = False
            hook.remove()


@covers(model_type=EXPERT_LAYOUTS, implementation=IMPLEMENTATIONS, backend=BACKENDS, gone=([3], [0, 3]))
def test_experts_on_another_device_are_honoured(load, model_type, implementation, backend, gone):
    model, rows = with_experts(load, model_type, implementation), len(gone)
    with elsewhere(model, gone):
        here = set(range(4)) - set(gone)
        session, reference = check(model, backend, prompt(rows, 5), min_tokens=2, here=here)
        for ffn in of_experts(session):
            assert not any(ffn.experts.prompt_tokens[expert] for expert in gone)
            assert set(gone) <= set(ffn.experts.dense)
    steps = [module for forward in reference.expert_active[1:] for module in forward]
    routes = [sum(map(len, experts.values())) for experts in steps]
    assert min(routes) < 2 * rows, "no route of a decode step led elsewhere"


# other dtypes and stores ------------------------------------------------------------------------------------------------


@backends
@implementations
def test_bfloat16_runs_on_every_implementation(load, implementation, backend):
    model, ids = with_experts(load, "gpt_oss", implementation, torch.bfloat16), prompt(2, 9)
    with torch.no_grad():
        dense = model(ids).logits
    with pruned(model, backend, gamma=GAMMA) as session:
        out = model.generate(ids, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.logits[0].bfloat16(), dense[:, -1]) or implementation == "eager"
    torch.testing.assert_close(out.logits[0].bfloat16(), dense[:, -1], rtol=0.05, atol=0.1)
    assert all(plan.sizes.width % 8 == 0 for plan in session.plans)
    assert all(logits.isfinite().all() for logits in out.logits)


def test_what_cannot_be_reordered_runs_masked_and_says_why(load):
    for name, change in (
        ("not contiguous", lambda p: nn.Parameter(p.data.transpose(1, 2).contiguous().transpose(1, 2))),
        ("a Tensor", None),
    ):
        model = tiny("mixtral", torch.float64)
        for module in experts_of(model):
            if change is not None:
                module.down_proj = change(module.down_proj)
            else:
                weight = module.down_proj.data
                del module.down_proj
                module.down_proj = weight
        with pruned(model, "auto") as session:
            found = generate(model, prompt())
        assert {plan.backend for plan in session.plans} == {"masked"}
        assert all(name in plan.reason for plan in session.plans)
        with MoEPop(model, RATIO) as reference:
            assert torch.equal(found[0], reference.greedy(prompt(), STEPS)[:, 9:])
        with pytest.raises(ConfigError, match=name):
            pruned(model, "inplace")


def test_experts_that_two_layers_share_run_masked(load):
    model = tiny("mixtral", torch.float64)
    first, second = experts_of(model)
    second.down_proj = first.down_proj
    with pruned(model, "auto") as session:
        found = generate(model, prompt())
    assert {plan.backend for plan in session.plans} == {"masked"}
    with MoEPop(model, RATIO) as reference:
        assert torch.equal(found[0], reference.greedy(prompt(), STEPS)[:, 9:])


@backends
def test_another_implementation_chosen_inside_a_session_is_an_error(load, backend):
    model = with_experts(load, "mixtral")
    with pruned(model, backend):
        model.set_experts_implementation("batched_mm")
        with pytest.raises(SessionError, match="'batched_mm' inside the session"):
            generate(model, prompt())
    assert model.get_experts_implementation() == {"": "eager"}


def test_unseen_experts_are_ranked_by_their_weights_in_any_order_of_the_channels(load):
    model = with_experts(load, "mixtral")
    short, long = prompt(1, 1, seed=3), prompt(1, 12)
    with pruned(model, "masked", unseen="weights") as session:
        generate(model, short)
        expected = partitions(session)
    with pruned(model, "inplace", unseen="weights") as session:
        generate(model, long)  # leaves the channels in its own order
        generate(model, short)
        assert partitions(session) == expected
