"""Hooks that users put on the parts of FFNs and on attention's projections, before a session or inside one."""

import pytest
import torch

from helpers.modes import backends, fresh, generate, pruned
from helpers.observe import prompt, same_afterwards
from pop_mm import SessionError, prune

FIRST = prompt(1, 12, seed=5)
PARTS = ("gate_proj", "up_proj", "act_fn", "down_proj")
SESSIONS = {
    "inplace": lambda model, **settings: pruned(model, "inplace", **settings),
    "rows": lambda model, **settings: prune(model, budget=0.6, **settings),
}
sessions = pytest.mark.parametrize("session_of", SESSIONS.values(), ids=SESSIONS.keys())


def part_of(model, name):
    mlp = model.model.layers[1].mlp
    return getattr(getattr(mlp, "experts", mlp), name)


def masked(session_of, model, ids=None):
    backend = {} if session_of is SESSIONS["inplace"] else {"backend": "masked"}
    session = pruned(model, "masked") if not backend else session_of(model, **backend)
    with session:
        return generate(model, prompt() if ids is None else ids)


def same(found, expected):
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-9)


def seen_by(module, kind):
    """What a hook of a user's sees."""
    seen = []
    if kind == "pre":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    else:
        handle = module.register_forward_hook(lambda _, __, out: seen.append(out.clone()))
    return seen, handle


def third_channel(tensor):
    changed = tensor.clone()
    changed[..., 3] = 2
    return changed


def changing(module, kind, change=third_channel):
    """A hook that changes one channel by its number."""
    if kind == "pre":
        return module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, __, out: change(out))


WHERE = [(family, part, kind) for family in ("llama", "qwen2_moe") for part in PARTS for kind in ("pre", "post")]
WHERE = [(family, part, kind) for family, part, kind in WHERE if family == "llama" or part == "act_fn"]
where = pytest.mark.parametrize(("family", "part", "kind"), WHERE)


@where
@sessions
def test_hooks_of_before_the_session_see_what_they_see_when_it_masks(family, part, kind, session_of):
    model = fresh(family)
    seen, _ = seen_by(part_of(model, part), kind)
    expected = masked(session_of, model)
    wanted = list(seen)
    with same_afterwards(model), session_of(model):
        for ids in (FIRST, prompt()):
            seen.clear()
            found = generate(model, ids)
    same(found, expected)
    assert len(seen) == len(wanted)
    for mine, other in zip(seen, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)


@where
@sessions
def test_hooks_of_before_the_session_may_change_single_channels(family, part, kind, session_of):
    model = fresh(family)
    changing(part_of(model, part), kind)
    expected = masked(session_of, model)
    with same_afterwards(model), session_of(model):
        generate(model, FIRST)
        same(generate(model, prompt()), expected)


CHANGES_INSIDE = [case for case in WHERE if case[1:] != ("down_proj", "pre")]


@pytest.mark.parametrize(("family", "part", "kind"), CHANGES_INSIDE)
@backends
def test_hooks_that_are_added_inside_may_change_single_channels(family, part, kind, backend):
    model, twin = fresh(family), fresh(family)
    plain = masked(SESSIONS["inplace"], twin)
    changing(part_of(twin, part), kind)
    expected = masked(SESSIONS["inplace"], twin)
    with pruned(model, backend) as session:
        same(generate(model, prompt()), plain)
        handle = changing(part_of(model, part), kind)
        same(generate(model, prompt()), expected)
        handle.remove()
        moved = session.report.moved_channels
        generate(model, FIRST)
        same(generate(model, prompt()), plain)
        assert (session.report.moved_channels > moved) == (backend == "inplace")


@pytest.mark.parametrize("remove", [False, True])
def test_hooks_that_come_and_go_between_steps(remove):
    model, twin = fresh(), fresh()

    def steps(model):
        with torch.no_grad():
            out = model(prompt(), use_cache=True)
            logits = []
            handle = None
            for number in range(6):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values)
                logits.append(out.logits)
                if number == 1:
                    handle = changing(part_of(model, "up_proj"), "post")
                if number == 3 and remove:
                    handle.remove()
        return torch.stack(logits)

    with pruned(twin, "masked"):
        expected = steps(twin)
    with pruned(model, "inplace"):
        torch.testing.assert_close(steps(model), expected, rtol=0, atol=1e-9)
    for (name, a), (_, b) in zip(model.named_parameters(), fresh().named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_packed_weights_are_unpacked_for_hooks():
    model = fresh().bfloat16()
    handle_of = {}

    def run(backend):
        with pruned(model, backend), torch.no_grad():
            out = model(prompt(), use_cache=True)
            logits = []
            for number in range(14):
                out = model(prompt()[:, number % 5].view(1, 1), past_key_values=out.past_key_values)
                logits.append(out.logits)
                if number == 10:
                    handle_of[0] = seen_by(part_of(model, "down_proj"), "pre")[1]
            handle_of[0].remove()
        return torch.stack(logits)

    torch.testing.assert_close(run("inplace"), run("masked"), rtol=0.05, atol=0.05)


# --- behind the session's own hooks ---------------------------------------------------------------------------------

MODULES = {
    "q_proj": lambda model: model.model.layers[1].self_attn.q_proj,
    "o_proj": lambda model: model.model.layers[1].self_attn.o_proj,
    "gate_proj": lambda model: model.model.layers[1].mlp.gate_proj,
    "down_proj": lambda model: model.model.layers[1].mlp.down_proj,
}


def doubling_in_place(module):
    def double(_, args):
        args[0].mul_(2)

    return module.register_forward_pre_hook(double)


ADDED = {"new": lambda module: changing(module, "pre"), "in place": doubling_in_place}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("backend", ["auto", "masked"])
@pytest.mark.parametrize("how", ["new", "in place"])
def test_a_pre_hook_that_changes_what_the_session_left_is_refused(name, backend, how):
    model = fresh()
    expected = masked(SESSIONS["rows"], model)
    with same_afterwards(model), SESSIONS["rows"](model, backend=backend):
        same(generate(model, prompt()), expected)
        handle = ADDED[how](MODULES[name](model))
        for _ in range(2):
            with pytest.raises(
                SessionError, match=rf"pre-hook that was added to a Linear of .*{name[:1]}.*before a new one"
            ):
                generate(model, prompt())
        handle.remove()
        same(generate(model, prompt()), expected)


def test_a_pre_hook_of_before_the_session_comes_before_it():
    model = fresh()
    for of in MODULES.values():
        changing(of(model), "pre")
    expected = masked(SESSIONS["rows"], model)
    with same_afterwards(model), SESSIONS["rows"](model):
        same(generate(model, prompt()), expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_pre_hook_that_only_looks_may_be_added(name):
    model = fresh()
    expected = masked(SESSIONS["rows"], model)
    with same_afterwards(model), SESSIONS["rows"](model):
        generate(model, prompt())
        seen, handle = seen_by(MODULES[name](model), "pre")
        same(generate(model, prompt()), expected)
        handle.remove()
        assert any((x == 0).any() for x in seen)


def test_a_pre_hook_that_changes_a_masked_input_of_down_is_refused():
    model = fresh()
    with same_afterwards(model), pruned(model, "masked"):
        handle = changing(part_of(model, "down_proj"), "pre")
        with pytest.raises(SessionError, match="pre-hook that was added"):
            generate(model, prompt())
        handle.remove()


@pytest.mark.parametrize("inside", [False, True])
def test_a_pre_hook_of_down_comes_before_the_choice_in_place(inside):
    model, twin = fresh(), fresh()
    changing(part_of(twin, "down_proj"), "pre")
    expected = masked(SESSIONS["inplace"], twin)
    if not inside:
        changing(part_of(model, "down_proj"), "pre")
    with pruned(model, "inplace"):
        if inside:
            generate(model, FIRST)
            changing(part_of(model, "down_proj"), "pre")
        same(generate(model, prompt()), expected)
