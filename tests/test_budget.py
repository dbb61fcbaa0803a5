"""Budgets: what they mean, that they are met by the models' own counts, and which settings contradict each other."""

import dataclasses
import warnings

import pytest
import torch

import pop_mm
from helpers.modes import LENGTH, generate
from helpers.observe import partitions, prompt
from helpers.reference import down_projections
from helpers.reference_thresholds import bin_of, edge, matrices
from helpers.reference_thresholds import quantile as naive_quantile
from pop_mm import ConfigError, ExpertPolicy, PopConfig, prune
from pop_mm.methods import METHODS, get_method
from pop_mm.methods.thresholds import BINS, hidden_share, histogram, magnitudes, quantile, share_above


def weights(model, scope):
    """Name -> (weights, is it a down projection) of every matrix of the layers, by names; what thresholds do not serve too."""
    served = matrices(model, attention=scope == "overall")
    found = {name: (module.weight.numel(), down) for name, (module, down) in served.items()}
    if scope == "overall":
        for name, module in model.named_modules():
            inside = any(part in name for part in ("self_attn", "attn", ".conv.", "attention"))
            weight = getattr(module, "weight", None)
            if inside and name not in found and "norm" not in name and weight is not None and weight.dim() > 1:
                found[name] = weight.numel(), None
    return found


@pytest.mark.parametrize("scope", ["overall", "ffn"])
@pytest.mark.parametrize("budget", [0.95, 0.65, 0.45])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "opt", "minicpm3", "lfm2"])
def test_a_token_reads_the_budget(load, model_type, budget, scope):
    model = load(model_type)
    if model_type == "lfm2" and budget == 0.45 and scope == "overall":
        return  # its convolution stays dense: a budget of its own, below
    session = prune(model, budget=budget, scope=scope)
    own = next(plan.shares for plan in session.plans if "h" in plan.shares)
    assert own["h"] == pytest.approx(hidden_share(own["x"]))
    counts = weights(model, scope)
    read = sum(n * (1 if down is None else own["h"] if down else own["x"]) for n, down in counts.values())
    assert read / sum(n for n, _ in counts.values()) == pytest.approx(budget, abs=1e-9)
    assert session.report.scope_share[0] == pytest.approx(budget, abs=1e-9)


def test_the_split_of_an_ffn():
    assert [round(hidden_share(rho), 3) for rho in (0.8, 0.7, 0.6, 0.5)] == [0.6, 0.5, 0.4, 0.3]
    shares = [hidden_share(number / 1000) for number in range(1001)]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)


def test_what_stays_dense_is_the_minimum(load):
    model = load("lfm2")
    counts = weights(model, "overall")
    least = sum(n for n, down in counts.values() if down is None) / sum(n for n, _ in counts.values())
    with pytest.raises(ConfigError, match=rf"budget of 0.1 cannot be met.*more than {least:.2f}\d") as error:
        prune(model, budget=0.1)
    named = float(str(error.value).split("more than ")[1].rstrip("."))
    prune(model, budget=named + 0.001)
    with pytest.raises(ConfigError):
        prune(model, budget=named - 0.002)


@pytest.mark.parametrize("method", ["pop", "static"])
@pytest.mark.parametrize(("scope", "budget"), [("ffn", 0.6), ("overall", 0.8), ("ffn", 0.05)])
def test_pop_reads_r_and_c_within_the_budget(model, method, scope, budget):
    session = prune(model, budget=budget, scope=scope, method=method)
    ffn = [n for name, (n, _) in weights(model, "ffn").items()]
    attention = sum(n for n, _ in weights(model, scope).values()) - sum(ffn)
    width = session.plans[0].sizes.width
    total = sum(ffn) + attention
    assert (
        (attention + sum(ffn) * width / 64) / total <= budget + 1e-9 < (attention + sum(ffn) * (width + 4) / 64) / total
    )


def test_pop_by_a_budget_is_pop_by_its_ratio(model):
    with prune(model, budget=0.8, method="pop") as session:
        found = generate(model, prompt(1, LENGTH)), partitions(session)
    with prune(model, ratio=session.plans[0].ratio, scope="ffn") as session:
        expected = generate(model, prompt(1, LENGTH)), partitions(session)
    assert torch.equal(found[0][0], expected[0][0]) and found[1] == expected[1]


def test_pop_names_its_minimum(model):
    with pytest.raises(ConfigError, match=r"method='pop'.*must be more than 0\.\d+") as error:
        prune(model, budget=0.1, method="pop")
    prune(model, budget=float(str(error.value).split("more than ")[1].rstrip(".")) + 0.01, method="pop")
    with pytest.raises(ConfigError, match=r"reads every channel\. Give ratio="):
        prune(model, budget=0.6, method="full")


def test_budget_1_of_pop_is_dense(model):
    dense = generate(model, prompt(1, LENGTH))
    with prune(model, budget=1, method="pop") as session:
        found = generate(model, prompt(1, LENGTH))
    assert session.plans[0].sizes.dense
    assert torch.equal(found[1], dense[1])


# settings -----------------------------------------------------------------------------------------------------------

BAD = [
    ({"ratio": 0.4, "budget": 0.6}, "both given. Give one"),
    ({"budget": 0}, r"budget must be a number in \(0, 1\]; got 0"),
    ({"budget": 1.01}, r"budget must be a number in \(0, 1\]"),
    ({"budget": "0.5"}, "budget must be a number"),
    ({"budget": True}, "budget must be a number"),
    ({"budget": float("nan")}, "budget must be a number"),
    ({"method": "treshold"}, "Unknown method 'treshold'; known: auto, .*thresholds.*Did you mean 'thresholds'"),
    ({"method": 3}, "Unknown method 3"),
    ({"method": "thresholds", "ratio": 0.4}, "takes a budget.*not ratio=0.4"),
    ({"budget": 0.6, "experts": ExpertPolicy(min_tokens=2)}, "min_tokens=2 is a setting of POP"),
    ({"budget": 0.6, "layer_ratios": {0: 0.1}}, "layer_ratios=.* is a setting of POP"),
    ({"budget": 0.6, "backend": "inplace"}, "backend='inplace' cannot serve method='thresholds'"),
    ({"budget": 0.6, "kernels": "compiled"}, "kernels='compiled' cannot serve method='thresholds'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        PopConfig(**settings)


def test_what_auto_stands_for(model):
    assert PopConfig().chosen_method == "thresholds" and PopConfig().budget == 0.65
    assert PopConfig(0.4).chosen_method == "pop" and PopConfig(0.4).budget is None
    assert PopConfig(budget=0.5, method="pop").chosen_method == "pop"
    assert type(prune(model)).__name__ == type(pop_mm.Session(model, PopConfig())).__name__ == "ThresholdSession"
    assert type(prune(model, 0.4)) is type(prune(model, budget=0.9, method="pop")) is pop_mm.Session


@pytest.mark.parametrize(
    "config", [PopConfig(), PopConfig(0.3), PopConfig(budget=0.5, scope="ffn"), PopConfig(0.3, method="static")]
)
def test_json_round_trips_without_a_warning(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PopConfig.from_json(config.to_json()) == config
        assert dataclasses.replace(config, scope="ffn").chosen_method == config.chosen_method


def test_the_registry():
    assert all(get_method(name).name == name for name in METHODS)


# the arithmetic -----------------------------------------------------------------------------------------------------


def test_bins_are_the_upper_bits():
    values = torch.tensor([0.0, 1e-45, 1e-40, 1.17549435e-38, 1.0, 1.0625, 1.9999999, 2.0, 3.4e38, -1.5])
    counts = histogram(magnitudes(values).unsqueeze(1), torch.ones(1, len(values), dtype=torch.bool))
    expected = [0] * BINS
    for value in values.tolist():
        expected[bin_of(abs(value))] += 1
    assert counts[0].tolist() == expected


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.73, 0.999])
def test_quantiles_and_shares(share):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, 50, generator=generator)
    counts = histogram(magnitudes(values), torch.ones(1, 40, dtype=torch.bool))
    bound = quantile(counts, share)
    assert float(bound) == naive_quantile(values.abs().flatten().tolist(), share)
    assert float(share_above(counts, bound)) == pytest.approx(share, abs=1e-3)
    kept = (values.abs() > bound).float().mean()
    assert abs(float(kept) - share) < 0.01


def test_counts_of_rows_add_up():
    generator = torch.Generator().manual_seed(1)
    values, row = torch.randn(30, 8, generator=generator).abs(), torch.arange(30) % 3
    tokens = torch.arange(3).unsqueeze(1) == row
    whole = histogram(values, tokens)
    parts = histogram(values[:11], tokens[:, :11]) + histogram(values[11:], tokens[:, 11:])
    assert torch.equal(whole, parts) and whole.sum(-1).tolist() == [80] * 3
    assert torch.equal(whole[1], histogram(values[row == 1], torch.ones(1, 10, dtype=torch.bool))[0])


def test_edges_of_bins_rise():
    edges = [edge(number) for number in range(4081)]
    assert edges == sorted(set(edges))


def test_only_ffns_are_touched_with_their_scope(model):
    seen = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].all())
    )
    with prune(model, budget=0.5, scope="ffn"):
        generate(model, prompt(1, LENGTH))
    handle.remove()
    assert all(seen)
    assert len(down_projections(model)) == 2
