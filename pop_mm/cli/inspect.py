"""``pop-mm inspect``: what a session would prune, and the bytes that a decoded token would read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import floor
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from ..adapters import Check, adapter_for, check, registered_adapters
from ..errors import SampleError
from ..report.footprint import AsStored, WeightBytes, footprint, itemsize
from ..report.tables import SCOPES, footprint_table, plan_table
from ..samples import load_config, resolve, takes_images
from ..samples.quantise import QuantiseError, check_weights, quantise
from ..session.planning import FFNPlan
from ..session.session import plan_ffns
from ..settings.config import PopConfig
from .generate import load_model, torch_dtype
from .inspect_thresholds import inspect_thresholds
from .stored import StoredBytes, bits_of, stored_tensors
from .terminal import quiet, spinner


def run(
    name: str,
    config: PopConfig,
    dtype: str,
    as_json: bool,
    contract: bool = False,
    wide: bool = True,
    weights: str = "auto",
) -> bool:
    """The command; false if the adapter's contract was asked for (``contract``) and is broken."""
    check_weights(weights)
    with quiet():
        model, quantisation = skeleton(name, dtype)
        if quantisation is not None and weights != "auto":
            raise QuantiseError(f"--weights {weights}: the checkpoint {name!r} is quantised already.")
        if quantisation is not None and _is_int8(quantisation):  # read as the weights that it stands for
            check_weights("int8")
            weights, quantisation = "int8", None
        quantise(model, weights)
        adapter = adapter_for(model)
        checked = check(load_model(name, dtype, weights=weights)[0]) if contract else None
        packed = None
        sizes: WeightBytes = AsStored(model)
        if quantisation is not None:
            packed = str(quantisation.get("quant_method", "quantised"))
            sizes = StoredBytes(model, stored_tensors(resolve(name)), bits_of(quantisation, itemsize(model)))
        if config.chosen_method == "thresholds":
            contracts = {} if checked is None else _contracts(checked)
            inspect_thresholds(model, config, adapter, packed, sizes, as_json, contracts, weights)
            _print_check(checked, as_json)
            return checked is None or checked.ok
        plans = plan_ffns(model, config, adapter)
    if packed is not None:
        plans = [_packed(plan, packed) for plan in plans]
    if as_json:
        found = {} if checked is None else _contracts(checked)
        rows = [
            {**_row(p, sizes.of_record(p.ffn)), "weight_format": weights, **found.get(p.ffn.name, {})} for p in plans
        ]
        print(json.dumps(rows, indent=2))
        return checked is None or checked.ok
    layers = adapter.layer_weights(model, [plan.ffn for plan in plans]).values()
    largest = floor(1000 * sum(w.ffn for w in layers) / sum(w.ffn + w.attention for w in layers)) / 1000
    console = Console()
    console.print(plan_table(plans, wide))
    console.print(footprint_table(footprint(model, adapter, plans, weights=sizes)))
    layouts = " / ".join(dict.fromkeys(plan.ffn.layout for plan in plans))
    asked = f"Budget {config.budget:g}" if config.ratio is None else f"Ratio {config.ratio:g}"
    console.print(
        f"{type(model).__name__}: {len(plans)} FFNs of {layouts}, found by {type(adapter).__name__}.\n"
        f"{asked} of {SCOPES[config.scope]} leaves out {plans[0].ratio:.1%} of each FFN; an overall ratio "
        f"must stay below {largest:.3f}.",
        highlight=False,
    )
    for reason in dict.fromkeys(plan.reason for plan in plans if plan.backend == "masked"):
        console.print(f"Masked, without speed-up: {reason}.", style="yellow", highlight=False, markup=False)
    _print_check(checked, as_json)
    return checked is None or checked.ok


def _print_check(checked: Check | None, as_json: bool) -> None:
    if checked is not None and not as_json:
        style = None if checked.ok else "yellow"
        Console().print(f"\n{checked}", style=style, highlight=False, markup=False, soft_wrap=True)


def skeleton(name: str, dtype: str) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The model without weights, from its config alone, and its ``quantization_config`` (None if it is not quantised).

    A model type without a registered adapter is loaded, since its structure has to be probed.
    """
    resolve(name)  # a sample is fetched here, with its own progress display
    with spinner(f"Reading the config of {name}"):
        config = load_config(name)
    if config.model_type not in registered_adapters():
        model, _ = load_model(name, dtype)
        return model, None
    kind = torch_dtype(dtype)
    if kind != "auto":
        config.dtype = kind
    try:
        with torch.device("meta"):
            auto = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
            model = auto.from_config(config)
    except Exception as error:  # sizes that do not fit raise whatever the model's own code does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise SampleError(f"The model {name!r} cannot be built from its config: {reason}.") from error
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return model, None
    return model, quantisation if isinstance(quantisation, dict) else quantisation.to_dict()


def _is_int8(quantisation: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is that of all linear modules as int8 with a scale for each output, by torchao."""
    kind = quantisation.get("quant_type")
    kind = kind.get("default") if isinstance(kind, Mapping) and len(kind) == 1 else None
    if quantisation.get("quant_method") != "torchao" or not isinstance(kind, Mapping):
        return False
    granularity = (kind.get("_data") or {}).get("granularity") or {}
    whole = not quantisation.get("modules_to_not_convert") and not quantisation.get("include_input_output_embeddings")
    return whole and kind.get("_type") == "Int8WeightOnlyConfig" and granularity.get("_type") == "PerRow"


def _row(plan: FFNPlan, whole: float) -> dict[str, Any]:
    return {
        **plan.to_dict(),
        "bytes_per_token_dense": round(whole),
        "bytes_per_token_pruned": round(whole * plan.share_read()),
    }


def _contracts(checked: Check) -> dict[str, dict[str, str | None]]:
    """Name of an FFN -> what the probe of its adapter found."""
    return {
        name: {
            "contract": "broken" if group.broken else "holds" if group.not_probed is None else "not probed",
            "finding": group.reason if group.broken else group.not_probed,
        }
        for group in checked.groups
        for name in group.names
    }


def _packed(plan: FFNPlan, method: str) -> FFNPlan:
    if plan.backend == "dense":
        return plan
    return replace(
        plan, backend="masked", reason=f"the checkpoint is quantised ({method}), and packed weights stay in place"
    )
