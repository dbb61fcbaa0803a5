"""What the tests of wrapped weights check: the same as the twin with plain weights, on every backend, and left as it was."""

from contextlib import nullcontext

import pytest
import torch

from helpers.modes import RATIO, generate, pruned
from helpers.observe import partitions, prompt, same_afterwards
from helpers.reference import Pop, columns, down_projections
from helpers.tiny_models import tiny

WAYS = [(backend, batch) for backend in ("auto", "masked") for batch in ("shared", "per_sequence")]
FEW_WAYS = [("auto", "shared"), ("masked", "per_sequence")]
ROWS, STEPS = 2, 3


def run(model, backend, batch):
    """Tokens, logits, partitions and backends of a pruned generation."""
    with pruned(model, backend, batch=batch) as session:
        out = model.generate(
            prompt(ROWS), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    found = {ffn.plan.ffn.name: ffn.plan for ffn in session.report.ffns}
    return torch.stack(out.logits), partitions(session), found


def choice_of_first_layer(model):
    """Its partition, which no other layer has a say in: of a changed down projection, its column norms alone."""
    return run(model, "masked", "shared")[1][0]


def check(model, twin, touched, tolerance=1e-9, ways=WAYS, unchanged=True):
    """A wrapped model gives what its twin with plain weights gives, and its FFNs that are ``touched`` run masked."""
    twins = {batch: run(twin, "masked", batch) for batch in dict.fromkeys(batch for _, batch in ways)}
    for backend, batch in ways:
        wanted, parts, _ = twins[batch]
        with same_afterwards(model) if unchanged else nullcontext():
            found, ours, plans = run(model, backend, batch)
        assert ours == parts, (backend, batch)
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
        for name, plan in plans.items():
            if touched(name):
                assert plan.backend == "masked", name
                assert plan.reason
            elif batch == "shared" and backend == "auto" and plan.ffn.role != "expert":
                assert plan.backend == "inplace", name


def check_packed(row, projections=("gate_proj", "up_proj", "down_proj"), unchanged=True):
    """A packed model gives what its dequantised twin gives.

    Where activations are rounded on the way too, no plain model gives the same: then the independent implementation of POP
    is run on the packed model itself, with the column norms of the dequantised weights where modules tell those (torchao),
    else of what they answer to an identity matrix, which is near.
    """
    original = tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    model = row.make(tiny("llama", hidden_size=64, intermediate_size=128, head_dim=16), projections)
    twin = row.twin(model, original)
    if unchanged:
        generate(model, prompt(), 2)  # what a format sets up on first use is no change
    assert any(
        not torch.equal(a.weight, b.weight)
        for a, b in zip(down_projections(twin), down_projections(original), strict=True)
    ) or projections != ("down_proj",)
    if row.options["exact"]:
        check(model, twin, lambda name: row.outcome == "masked", 2e-5, unchanged=unchanged)
        return
    with torch.no_grad():
        rows = [d(torch.eye(128)) - d(torch.zeros(1, 128)) for d in down_projections(model)]
    norms = [row.norm(dim=1).tolist() for row in rows]
    told = [columns(down).norm(dim=1).tolist() for down in down_projections(twin)]
    torch.testing.assert_close(torch.tensor(told), torch.tensor(norms), rtol=0.02, atol=0)
    norms = told if row.package == "torchao" else norms
    for backend, batch in WAYS:
        with Pop(model, RATIO, batch=batch, norms=norms) as reference:
            tokens = reference.greedy(prompt(ROWS), STEPS)
        with same_afterwards(model), pruned(model, backend, batch=batch) as session:
            found = model.generate(prompt(ROWS), max_new_tokens=STEPS, do_sample=False)
            plans = session.plans
        assert partitions(session) == reference.parts
        assert torch.equal(found, tokens)
        assert {plan.backend for plan in plans} == {"masked"}
    for plan, wanted in zip(plans, norms, strict=True):
        torch.testing.assert_close(plan.ffn.down_column_norms(), torch.tensor(wanted), rtol=1e-5, atol=0)


def importable(row):
    """Skip, naming the package, where it is missing."""
    names = {"optimum-quanto": "optimum.quanto", "compressed-tensors": "compressed_tensors"}
    pytest.importorskip(
        names.get(row.package, row.package), reason=f"{row.package} is not installed", exc_type=ImportError
    )
