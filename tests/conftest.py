"""Models that every test must leave as it found them."""

import gc
import signal
from functools import cache

import pytest
import torch

from helpers.observe import differences, fingerprint, prompt
from helpers.tiny_models import tiny
from pop_mm.cli import main

torch.set_num_threads(1)  # tiny models only lose by more

# A ReLU zeroes channels by itself; a smooth activation lets the tests see which ones the library zeroed.
_SETTINGS = {
    "opt": {"activation_function": "gelu"},
    "nemotron": {"hidden_act": "gelu"},
    "arcee": {"hidden_act": "gelu"},
    "jais2": {"hidden_act": "gelu"},
    "nanochat": {"hidden_act": "gelu"},
    "persimmon": {"hidden_act": "gelu"},
    "mpt": {"use_cache": True},  # off by default
}


def pytest_collection_finish():
    """Modules and tests stay until the end: what looks through all objects need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@cache
def _model(model_type, dtype, settings):
    model = tiny(model_type, dtype, **{**_SETTINGS.get(model_type, {}), **dict(settings)})
    model.generate(prompt(), max_new_tokens=2)  # whatever a model sets up on first use is no change
    return model, fingerprint(model)


@pytest.fixture
def load():
    """``load("llama")``: a tiny float64 model; the test fails if it does not leave it bit for bit what it was."""
    used = {}

    def load(model_type="llama", dtype=torch.float64, **settings):
        key = model_type, dtype, tuple(sorted(settings.items()))
        used[key] = _model(*key)
        return used[key][0]

    yield load
    changed = {key: differences(before, fingerprint(model)) for key, (model, before) in used.items()}
    if any(changed.values()):
        _model.cache_clear()  # the next test is not to blame
    assert not any(changed.values()), f"the test changed a model: {changed}"


@pytest.fixture
def model(load):
    """A tiny llama in float64."""
    return load()


@pytest.fixture
def wide_terminal_and_no_network(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def call(capsys, wide_terminal_and_no_network, monkeypatch):
    """Run a command in this process: exit code, stdout, stderr."""
    monkeypatch.delattr(
        "pop_mm.session.session.Session.__del__"
    )  # a session that an earlier test never attached may die here

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, which it does not in a process that a shell has put in the background."""
    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, own)


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A cache of samples in which the language models are tiny."""
    from helpers.pages import stand_in_cache

    folder = tmp_path_factory.mktemp("samples")
    stand_in_cache(folder)
    return folder


@pytest.fixture
def away(stand_ins, tmp_path, monkeypatch):
    """For examples: a folder of their own, tiny samples, no network; what they register is forgotten."""
    from helpers.pages import working_folder
    from pop_mm.adapters import registered_adapters, unregister_adapter
    from pop_mm.methods import METHODS, unregister_method

    monkeypatch.setenv("POP_MM_CACHE", str(stand_ins))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    working_folder(tmp_path)
    adapters, methods = set(registered_adapters()), set(METHODS)
    yield tmp_path
    for name in set(registered_adapters()) - adapters:
        unregister_adapter(name)
    for name in set(METHODS) - methods:
        unregister_method(name)
