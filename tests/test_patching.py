"""What is put on instances of modules is taken off exactly, the last change first."""

import pytest
import torch
from torch import nn

from helpers.observe import same_afterwards
from pop_mm.errors import SessionError
from pop_mm.patching import Patches, why_not


def test_everything_is_put_back_as_it_was(load):
    model = load()
    layer = model.model.layers[0].mlp
    with same_afterwards(model):
        with Patches() as patches:
            patches.forward(layer, lambda x: 0 * x)
            patches.forward(layer, lambda x: x)  # on top of the one before
            patches.replace(model, "generate", None)
            patches.hook(layer.register_forward_hook(lambda *_: None))
            assert layer(torch.ones(1, 32)).sum() == 32
        assert "forward" not in vars(layer)


def test_an_attribute_of_the_instance_comes_back():
    module = nn.Linear(2, 2)
    own = module.forward = lambda x: 2 * x
    patches = Patches()
    patches.remove(module, "forward")
    assert "forward" not in vars(module)
    patches.replace(module, "forward", abs)
    patches.undo()
    assert module.forward is own


def test_the_rest_is_undone_where_one_step_fails():
    module, patches, order = nn.Linear(2, 2), Patches(), []

    def fail():
        order.append("second")
        raise RuntimeError("no")

    patches.replace(module, "mark", 1)
    patches.undo_by(order.append, "first")
    patches.undo_by(fail)
    with pytest.raises(RuntimeError, match="no"):
        patches.undo()
    assert order == ["second", "first"]
    assert not hasattr(module, "mark")
    patches.undo()  # nothing is left
    assert order == ["second", "first"]


@pytest.mark.parametrize("kind", ["compiled", "script"])
def test_a_module_whose_calls_would_run_past_it_is_refused(kind):
    module = nn.Linear(2, 2)
    if kind == "compiled":
        module.compile(backend="eager")
    else:
        module = torch.jit.script(module)
    assert why_not(nn.Linear(2, 2)) is None
    with pytest.raises(SessionError, match="cannot be replaced: it is"):
        Patches().forward(module, abs)
    assert getattr(module, "forward", None) is not abs
