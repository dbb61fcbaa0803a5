"""What tests do with the channels of a model: exchange them, compute them, look at them."""

import torch

from pop_mm.adapters import adapter_for
from pop_mm.weights.experts import Experts

IDS = torch.randint(1, 96, (2, 16), generator=torch.Generator().manual_seed(1))
IN_FLOAT32 = {"beam", "nemotron_h"}  # logits (beam: also the activations of its experts), whatever the weights are


def close(model_type, bound):
    """Tolerance in float64."""
    return dict(rtol=0, atol=1e-5 if model_type in IN_FLOAT32 else bound)


def records_of(model):
    return adapter_for(model).projections(model)


def experts_of(model):
    return [record for record in records_of(model) if isinstance(record, Experts)]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def bits(model):
    """Every parameter and buffer as integers."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return {
        name: tensor.clone().view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.state_dict().items()
    }


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random_swaps(size, seed):
    """Disjoint positions, 3 of them left alone."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[: size // 2 - 1], order[size // 2 + 1 :][: size // 2 - 1]


def swap_everything(records):
    """Other channels in each FFN and each expert; the same call puts them back."""
    for record in records:
        if isinstance(record, Experts):
            for expert in range(record.count):
                record.swap(expert, *random_swaps(record.size, 10 * record.layer + expert))
        else:
            record.swap(*random_swaps(record.size, record.layer))


@torch.no_grad()
def compute(record, expert, x, width):
    """An expert's first ``width`` channels, from its views."""
    parts = [x @ w if b is None else x @ w + b for w, b in record.input_views(expert, width)]
    gate_up = torch.cat(parts, -1)
    h = record.module._apply_gate(gate_up) if record.module.has_gate else record.module.act_fn(gate_up)
    weight, bias = record.down_view(expert, width)
    return h @ weight if bias is None else h @ weight + bias


@torch.no_grad()
def run(record, expert, x):
    """The module's own output for tokens that are all routed to one expert."""
    ids = torch.full((len(x), 1), expert)
    return record.module(x, ids, torch.ones(len(x), 1, dtype=x.dtype))


def inputs(record):
    """5 tokens for an FFN or an expert."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(5, record.hidden_size, generator=generator).to(record.float_dtype)


def channel(record, expert, index):
    """Weights of one channel, from the stored tensors: what gate and up read, what down writes."""
    module, size = record.module, record.size
    if not module.has_gate:
        rows = [index]
    elif module.is_concatenated:
        rows = [index, size + index]
    else:
        rows = [2 * index, 2 * index + 1]
    reads = module.gate_up_proj[expert] if module.has_gate else module.up_proj[expert]
    reads = reads.t() if module.is_transposed else reads
    writes = module.down_proj[expert] if module.is_transposed else module.down_proj[expert].t()
    return reads[rows], writes[index]
