"""What the tests see of a model from outside: which channels enter a down projection, and whether a model changed."""

import weakref
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from helpers.reference import columns, down_projections

TRANSFORMERS_OWN = {"config", "generation_config", "_previous_max_cache_length"}  # generate() sets them itself
_PRODUCTS = {F.linear, torch.mm, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_GROUPED = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}


def prompt(rows=1, length=9, seed=0):
    """Random token ids [rows, length], never special ones."""
    return torch.randint(3, 90, (rows, length), generator=torch.Generator().manual_seed(100 + seed))


class InDouble(TorchFunctionMode):
    """Norms, routers and softmaxes that compute in float32 stay in float64, so that logits agree to the last digits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            args = [torch.float64 if a is torch.float32 else a for a in args]
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


class Active(TorchFunctionMode):
    """Records every product with a down projection's weight, however and in whatever order the library stores it.

    Original channels are recognised by their columns, bit for bit.

    Attributes
    ----------
    seen : list of list of Tensor
        For each FFN, for each product: [tokens, D] boolean, true where a channel's activation is not zero.
    """

    def __init__(self, model):
        super().__init__()
        self._downs = down_projections(model)
        self._channel = [{row.numpy().tobytes(): i for i, row in enumerate(columns(down))} for down in self._downs]
        self.seen = [[] for _ in self._downs]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS:
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            for index, down in enumerate(self._downs):
                weight = down.weight
                here = weight.untyped_storage().data_ptr()
                if any(t.untyped_storage().data_ptr() == here for t in tensors):
                    self._see(index, here, tensors)
        return func(*args, **(kwargs or {}))

    def _see(self, index, storage, tensors):
        weight = next(t for t in tensors if t.untyped_storage().data_ptr() == storage)
        h = next(t for t in tensors if t.untyped_storage().data_ptr() != storage and t.dim() > 1)
        h = h.detach().reshape(-1, h.shape[-1])
        rows = weight.detach().double()
        rows = (
            rows
            if len(rows) == h.shape[-1] and self._channel[index].get(rows[0].numpy().tobytes()) is not None
            else rows.t()
        )
        channels = [self._channel[index][row.contiguous().numpy().tobytes()] for row in rows]
        active = torch.zeros(len(h), len(self._channel[index]), dtype=torch.bool)
        active[:, channels] = h != 0
        self.seen[index].append(active)

    def sets(self, rows):
        """As ``reference.Pop.active``: of every forward, of each FFN, of each row, of each column."""
        return [
            [
                [[set(column.nonzero().flatten().tolist()) for column in row] for row in a.view(rows, -1, a.shape[-1])]
                for a in forward
            ]
            for forward in zip(*self.seen, strict=True)
        ]


class ActiveExperts(TorchFunctionMode):
    """Records every product with the down projections of routed experts, whichever implementation computes it.

    An expert's original channels are recognised by their rows, bit for bit.

    Attributes
    ----------
    seen : list of list of dict
        As ``reference_moe.MoEPop.expert_active``: of every forward, of each set of experts, by expert: sorted lists of
        the channels whose activation is not zero, one for each token.
    """

    def __init__(self, model):
        super().__init__()
        self._model = model
        self._modules = [module for module in model.modules() if hasattr(module, "is_concatenated")]
        self._channel = {}
        for index, module in enumerate(self._modules):
            for expert, down in enumerate(module.down_proj.detach()):
                for channel, row in enumerate(_rows(down if module.is_transposed else down.t())):
                    self._channel[row] = index, expert, channel
        self.seen = []

    def __enter__(self):
        self._hook = self._model.register_forward_pre_hook(lambda *_: self.seen.append([{} for _ in self._modules]))
        return super().__enter__()

    def __exit__(self, *args):
        self._hook.remove()
        for forward in self.seen:
            for found in (tokens for module in forward for tokens in module.values()):
                found.sort()
        return super().__exit__(*args)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.bmm:  # every token brings a copy of its expert
            for one, other in zip(*args[:2], strict=True):
                weight, h = (one, other.t()) if other.shape[-1] == 1 else (other, one)
                self._see(weight, h)
        elif func in _PRODUCTS or func in _GROUPED:
            tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
            for weight in (t for t in tensors if self._is_down(t)):
                h = next(t for t in tensors if t is not weight)
                if func in _GROUPED:
                    starts = [0, *kwargs["offs"].tolist()]
                    for expert in range(len(weight)):
                        self._see(weight[expert], h[starts[expert] : starts[expert + 1]])
                else:
                    self._see(weight, h)
        return func(*args, **(kwargs or {}))

    def _is_down(self, tensor):
        here = tensor.untyped_storage().data_ptr()
        return any(m.down_proj.untyped_storage().data_ptr() == here for m in self._modules)

    def _see(self, weight, h):
        weight, h = weight.detach(), h.detach()
        rows = _rows(weight if _rows(weight[:1])[0] in self._channel else weight.t())
        if rows[0] not in self._channel:
            return  # not a down projection
        places = [self._channel[row] for row in rows]
        assert len({place[:2] for place in places}) == 1
        index, expert, _ = places[0]
        channels = torch.tensor([channel for *_, channel in places])
        for token in h:
            active = channels[token != 0].sort().values.tolist()
            self.seen[-1][index].setdefault(expert, []).append(active)


def _rows(matrix):
    return [row.tobytes() for row in matrix.contiguous().view(torch.uint8).numpy()]


def _bits(tensor):
    if not isinstance(tensor, torch.Tensor):  # the mesh of a shard
        return str(tensor)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, rest = tensor.__tensor_flatten__()  # a subclass that packs its numbers
        return [(name, _bits(getattr(tensor, name))) for name in names], str(rest)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def standing(model):
    """Parameters by name as they stand in the modules: ``parameters()`` gives them back their own order in a session."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def of_experts(session):
    """The reports of a session's routed experts, in the order of execution."""
    return [ffn for ffn in session.report.ffns if ffn.plan.ffn.role == "expert"]


def of_dense(session):
    """As ``reference.Pop.parts``: those of dense FFNs and shared experts."""
    return [
        parts
        for ffn, parts in zip(session.report.ffns, partitions(session), strict=True)
        if ffn.plan.ffn.role != "expert"
    ]


def partitions(session):
    """As ``reference.Pop.parts``, from a session's report."""
    found = []
    for ffn in session.report.ffns:
        p = ffn.partition
        parts = [
            t.reshape(t.shape[:-1].numel(), -1 if t.numel() else 0).tolist()
            for t in (p.retained, p.candidates, p.pruned)
        ]
        found.append([tuple(map(set, row)) for row in zip(*parts, strict=True)])
    return found


def _stored(tensor):
    """How a tensor lies in memory, and its gradient."""
    if not isinstance(tensor, torch.Tensor):  # the mesh of a shard
        return str(tensor)
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # a subclass that packs its numbers
        return [(name, id(getattr(tensor, name)), _stored(getattr(tensor, name))) for name in names]
    grad = tensor.grad
    return tensor.stride(), tensor.storage_offset(), None if grad is None else (id(grad), grad.stride(), _bits(grad))


class _Tensor(NamedTuple):
    """A tensor of a model: the object, its values, how it lies in memory.

    It does not hold the object: a session looks through the whole process for who else uses a weight that is held.
    """

    held: weakref.ref
    values: torch.Tensor
    stored: object


def _tensor(tensor):
    return _Tensor(weakref.ref(tensor), tensor.detach().clone(), _stored(tensor))


def fingerprint(model):
    """Everything of a model that a session could leave behind."""
    found = {"config": str(model.config.to_dict()), "generation": str(model.generation_config.to_dict())}
    found["implementation"] = str(model.get_experts_implementation())
    for name, module in model.named_modules(remove_duplicate=False):
        if hasattr(module, "config"):  # some is in no dict of the config
            found[name, "config"] = sorted((key, str(value)) for key, value in vars(module.config).items())
        found[name, "class"] = type(module)
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for own, tensor in value.items():
                    found[name, key, own] = None if tensor is None else _tensor(tensor)
            elif isinstance(value, dict):
                found[name, key] = list(value.items())
            elif isinstance(value, torch.Tensor):  # computed from parameters before each forward
                found[name, key] = _bits(value.detach())
            elif key not in TRANSFORMERS_OWN:
                found[name, key] = value if isinstance(value, bool | int | float | str | None) else id(value)
    return found


def differences(before, after):
    """Keys of two fingerprints that differ; tensors must be the same objects with the same bits."""
    different = sorted(map(str, before.keys() ^ after.keys()))
    for key in before.keys() & after.keys():
        old, new = before[key], after[key]
        if isinstance(old, _Tensor):
            same = isinstance(new, _Tensor) and old.held() is not None and old.held() is new.held()
            same = same and old.values.dtype == new.values.dtype and old.stored == new.stored
            same = same and _bits(old.values) == _bits(new.values)
        else:
            same = old == new
        if not same:
            different.append(str(key))
    return different


@contextmanager
def same_afterwards(model):
    """Fail if the model is not what it was."""
    before = fingerprint(model)
    yield
    assert differences(before, fingerprint(model)) == []


class Wrapped(nn.Module):
    """A linear layer in a wrapper with a low-rank addition, as LoRA does; its ``weight`` is not all of it."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(base.weight.dtype) * 0.2)
        self.b = nn.Parameter(torch.randn(base.out_features, 2, generator=generator).to(base.weight.dtype) * 0.2)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x @ self.a.t() @ self.b.t()
