"""A session: life, exact restore, and prompts, caches, models and threads that must not mix."""

import gc
import signal
import threading
import weakref

import pytest
import torch

import pop_mm.weights.exchange
from helpers.covering import covers
from helpers.modes import BACKENDS, LAYOUTS, LENGTH, STEPS, alone, backends, fresh, generate, pruned
from helpers.observe import differences, fingerprint, prompt, same_afterwards
from helpers.reference import down_projections
from helpers.tiny_models import tiny
from pop_mm import SessionError


class Stop(Exception):
    pass


# --- restore --------------------------------------------------------------------------------------------------------


@covers(
    model_type=LAYOUTS,
    backend=BACKENDS,
    error=(Stop, KeyboardInterrupt, SystemExit),
    forward=(1, 3),  # in prefill, in decode
)
def test_an_exception_in_generate_leaves_no_trace(load, model_type, backend, error, forward):
    model = load(model_type)
    count = 0

    def fail(*_):
        nonlocal count
        count += 1
        if count == forward:
            raise error

    def interrupted():
        with pruned(model, backend):
            hook = down_projections(model)[-1].register_forward_pre_hook(fail)
            try:
                model.generate(prompt(), max_new_tokens=STEPS)
            finally:
                hook.remove()

    with pytest.raises(error):
        interrupted()
    with pruned(model, backend):  # and the next session works
        model.generate(prompt(), max_new_tokens=2)


@backends
def test_a_session_goes_on_after_an_exception_in_generate(model, backend):
    expected = alone(model, prompt())
    with pruned(model, backend):
        hook = down_projections(model)[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.generate(prompt(), max_new_tokens=2)
        hook.remove()
        assert torch.equal(generate(model, prompt())[0], expected)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back_in_every_dtype(backend, dtype):
    model = tiny("llama", dtype)
    model.model.layers[0].mlp.down_proj.weight.data[0, :3] = torch.tensor([-0.0, 0.0, 1e-8])
    model.generate(prompt(), max_new_tokens=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pruned(model, backend):
        for seed in range(3):
            model.generate(prompt(seed=seed), max_new_tokens=3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8)), name


@backends
def test_hooks_and_forwards_of_the_user_stay(backend):
    model = fresh()
    down = down_projections(model)[0]
    seen = []
    down.register_forward_pre_hook(lambda *_: seen.append("pre"))
    down.register_forward_hook(lambda *_: seen.append("post"))
    model.generate = model.generate  # an instance attribute of the user's own
    model.generate(prompt(), max_new_tokens=1)
    with same_afterwards(model), pruned(model, backend):
        seen.clear()
        model.generate(prompt(), max_new_tokens=3)
        assert seen == ["pre", "post"] * 3


@backends
def test_attach_and_detach_without_a_with_block(model, backend):
    before = fingerprint(model)
    session = pruned(model, backend).attach()
    model.generate(prompt(), max_new_tokens=3)
    with pytest.raises(SessionError, match="attached already"):
        session.attach()
    session.detach()
    assert differences(before, fingerprint(model)) == []
    session.detach()  # harmless
    expected = alone(model, prompt())
    with session:
        assert torch.equal(generate(model, prompt())[0], expected)


@backends
def test_nested_sessions_are_refused(model, backend):
    with pruned(model, backend):
        expected = generate(model, prompt())[0]
        with pytest.raises(SessionError, match="another session"), pruned(model):
            pass
        assert torch.equal(generate(model, prompt())[0], expected)


# --- nothing leaks --------------------------------------------------------------------------------------------------


@backends
def test_a_second_prompt_is_as_in_a_session_of_its_own(model, backend):
    expected = [alone(model, prompt(seed=seed)) for seed in range(3)]
    with pruned(model, backend):
        for seed in (0, 1, 2, 1, 0):
            assert torch.equal(generate(model, prompt(seed=seed))[0], expected[seed])


@pytest.mark.parametrize("kinds", [BACKENDS, ("inplace", "inplace")])
def test_two_models_in_two_threads_do_not_mix(kinds):
    models = [fresh(seed=seed) for seed in range(2)]
    expected = [alone(model, prompt()) for model in models]
    sessions = [pruned(model, kind).attach() for model, kind in zip(models, kinds, strict=True)]
    found = in_threads(lambda i: [generate(models[i], prompt())[0] for _ in range(8)])
    for session in sessions:
        session.detach()
    for i in range(2):
        assert all(torch.equal(tokens, expected[i]) for tokens in found[i])


def test_one_masked_model_in_two_threads_keeps_prompts_apart(model):
    expected = [alone(model, prompt(seed=seed)) for seed in range(2)]
    with pruned(model, "masked"):
        found = in_threads(lambda i: [generate(model, prompt(seed=i))[0] for _ in range(8)])
    for i in range(2):
        assert all(torch.equal(tokens, expected[i]) for tokens in found[i])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_concurrent_forwards_of_one_in_place_model_are_an_error(load, model_type):
    model = load(model_type)
    inside, leave = threading.Event(), threading.Event()
    with pruned(model, "inplace"):
        expected = generate(model, prompt())[0]

        def wait(*_):
            inside.set()
            leave.wait(30)

        hook = model.get_input_embeddings().register_forward_hook(wait)
        thread = threading.Thread(target=model.generate, args=(prompt(),), kwargs={"max_new_tokens": 2})
        thread.start()
        inside.wait(30)
        try:
            with pytest.raises(SessionError, match="Two threads"):
                model(prompt())
        finally:
            hook.remove()
            leave.set()
            thread.join()
        assert torch.equal(generate(model, prompt())[0], expected)


def in_threads(work):
    found = [None, None]

    def run(i):
        found[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@backends
def test_a_session_keeps_no_cache_alive(model, backend):
    with pruned(model, backend):
        out = model.generate(prompt(), max_new_tokens=3, return_dict_in_generate=True)
        cache = weakref.ref(out.past_key_values)
        del out
        gc.collect()
        assert cache() is None


def test_a_prompt_whose_cache_is_gone_leaves_its_place_to_an_older_one(model):
    ids = [prompt(1, LENGTH, seed) for seed in (0, 1)]
    expected = alone(model, ids[0])
    with pruned(model, "inplace") as session, torch.no_grad():
        out = model(ids[0], use_cache=True)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for step in range(STEPS - 1):
            if step == 1:
                model.generate(ids[1], max_new_tokens=3)
                gc.collect()
            logits = model(tokens[-1], past_key_values=out.past_key_values).logits
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        assert torch.equal(torch.cat(tokens, 1), expected)
        assert session.timings.masked_forwards == 0


def after_exchange(monkeypatch, number, happens):
    """From now on something happens when so many matrices have been exchanged; None: at each of them."""
    count, own = 0, pop_mm.weights.exchange.exchanges

    def exchanges(*args):
        nonlocal count
        for exchange in own(*args):
            yield exchange
            count += 1
            if number in (count, None):
                happens()

    monkeypatch.setattr(pop_mm.weights.exchange, "exchanges", exchanges)


def out_of_memory():
    raise torch.OutOfMemoryError


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def while_moving(test):
    """Each of them after each of the first exchanges, of an FFN and of experts."""
    errors = [(ctrl_c, KeyboardInterrupt), (out_of_memory, torch.OutOfMemoryError)]
    test = pytest.mark.parametrize(("happens", "error"), errors)(test)
    test = pytest.mark.parametrize("exchange", range(1, 12, 2))(test)
    test = pytest.mark.parametrize("model_type", ["llama", "mixtral"])(test)
    return pytest.mark.usefixtures("interruptible")(test)


@while_moving
def test_an_exception_while_channels_move_leaves_no_half_moved_ffn(
    load, monkeypatch, model_type, exchange, happens, error
):
    model = load(model_type)
    after_exchange(monkeypatch, exchange, happens)
    with same_afterwards(model), pytest.raises(error), pruned(model, "inplace"):
        model.generate(prompt(), max_new_tokens=STEPS)


@while_moving
def test_an_exception_while_another_prompt_comes_leaves_the_other_prompts_whole(
    load, monkeypatch, model_type, exchange, happens, error
):
    model = load(model_type)

    def decode(backend):
        with pruned(model, backend), torch.no_grad():
            older, newer = (model(prompt(seed=seed), use_cache=True) for seed in (0, 1))
            older = model(torch.tensor([[7]]), past_key_values=older.past_key_values)
            if backend == "inplace":
                with monkeypatch.context() as patched:
                    after_exchange(patched, exchange, happens)
                    with pytest.raises(error):
                        model(torch.tensor([[8]]), past_key_values=newer.past_key_values)
            newest = model(prompt(seed=2), use_cache=True)
            logits = model(torch.tensor([[9]]), past_key_values=older.past_key_values).logits
            return logits, model(torch.tensor([[9]]), past_key_values=newest.past_key_values).logits

    for found, expected in zip(decode("inplace"), decode("masked"), strict=True):
        assert torch.allclose(found, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_a_session_ends_waits_for_the_model(model, monkeypatch):
    with same_afterwards(model):
        session = pruned(model, "inplace").attach()
        model.generate(prompt(), max_new_tokens=STEPS)
        after_exchange(monkeypatch, None, ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            session.detach()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, None])
def test_ctrl_c_is_left_alone_where_it_does_nothing(model, handler):
    own = signal.signal(signal.SIGINT, handler or (lambda *_: None))
    try:
        with pruned(model, "inplace"):
            model.generate(prompt(), max_new_tokens=STEPS)
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, own)
