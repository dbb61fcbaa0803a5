"""Wrappers of weights and ways to call a model, and what pop_mm makes of each.

This list is behind the tests and docs/compatibility.md, which ``python tests/helpers/compatibility.py`` writes. A row says how to
make the model (``make``), or which file tests it (``tests``).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.parametrize as parametrize
import torch.nn.utils.prune as torch_prune
from torch import nn

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """One wrapper or call.

    Attributes
    ----------
    name : str
        What a user calls it; Markdown.
    group : str
        Heading in the table.
    package : str
        Distribution in constraints.txt that it comes from; its version is in the page.
    outcome : {"fast", "masked", "refused"}
        Of an FFN that it touches: in place, masked in front of the down projection (right, without speed-up), or an error
        before anything changes.
    make : callable or None
        Takes a tiny model and the names of the projections; gives the model to prune, changed or new.
    twin : callable or None
        From what ``make`` gave, the same model with plain weights.
    note : str
    options : dict
        What the test of the group needs to know.
    tests : str
        The file that tests it.
    """

    name: str
    group: str
    package: str
    outcome: str
    make: Callable[..., Any] | None = None
    twin: Callable[..., Any] | None = None
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    tests: str = "test_wrapped_weights.py"


# adapters -----------------------------------------------------------------------------------------------------------


def peft_model(config: str, noise: float = 0.3, **settings: Any) -> Callable[..., Any]:
    """Makes a PeftModel with this config's tuner around some projections, every weight that it trains random."""

    def make(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
        import peft

        options = dict(settings)
        if config == "IA3Config":
            options["feedforward_modules"] = [name for name in projections if name == "down_proj"]
        if (key := "target_parameters") in options:
            options |= {key: [f"{name}.weight" for name in projections], "target_modules": []}
        options |= {key: value(peft) for key, value in options.items() if callable(value)}
        tuner = getattr(peft, config)(**{"target_modules": list(projections), **options})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            wrapped = peft.get_peft_model(model, tuner).eval()
        randomise(wrapped, noise=noise)
        return wrapped

    return make


def randomise(wrapped: nn.Module, seed: int = 0, noise: float = 0.3) -> None:
    """Train an adapter so far that other channels are chosen: of one that does nothing a test would see nothing."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator) * noise
            parameter.data = parameter.data + change.to(parameter.dtype)


def merged(wrapped: Any) -> Any:
    """The twin of a PeftModel, by peft itself."""
    return copy.deepcopy(wrapped).merge_and_unload().eval()


def _bd_lora(peft: Any) -> Any:
    return peft.BdLoraConfig(
        target_modules_bd_a=["down_proj", "o_proj"], target_modules_bd_b=["gate_proj", "up_proj", "q_proj"], nblocks=2
    )


def _tuner(name: str, config: str, tolerance: float = 1e-9, dtype: Any = None, **settings: Any) -> Row:
    options = {"tolerance": tolerance, "dtype": dtype}
    return Row(name, "Adapters", "peft", "masked", peft_model(config, **settings), merged, options=options)


ADAPTERS = [
    _tuner("LoRA", "LoraConfig", r=4),
    _tuner("LoRA with dropout", "LoraConfig", r=4, lora_dropout=0.5),
    _tuner("LoRA with biases", "LoraConfig", r=4, lora_bias=True),
    _tuner("rsLoRA", "LoraConfig", r=4, use_rslora=True),
    _tuner("DoRA", "LoraConfig", r=4, use_dora=True),
    _tuner("PiSSA", "LoraConfig", tolerance=1e-4, r=4, init_lora_weights="pissa", dtype=torch.float32),
    _tuner("OLoRA", "LoraConfig", tolerance=1e-4, r=4, init_lora_weights="olora", dtype=torch.float32),
    _tuner("MiCA", "LoraConfig", tolerance=1e-4, r=4, init_lora_weights="mica", dtype=torch.float32),
    _tuner("QA-LoRA", "LoraConfig", r=4, use_qalora=True, qalora_group_size=8),
    _tuner("KaSA", "LoraConfig", r=4, kasa_config=lambda peft: peft.KasaConfig()),
    _tuner("VeLoRA", "LoraConfig", r=4, velora_config=lambda peft: peft.VeloraConfig()),
    _tuner("MonteCLoRA", "LoraConfig", r=4, monteclora_config=lambda peft: peft.MontecloraConfig()),
    _tuner("BD-LoRA", "LoraConfig", r=4, use_bdlora=_bd_lora),
    _tuner("LoRA on `target_parameters` of an FFN", "LoraConfig", r=4, target_parameters=None),
    _tuner("AdaLoRA", "AdaLoraConfig", total_step=10, init_r=4),
    _tuner("AdaMSS", "AdamssConfig", r=4),
    _tuner("BEFT", "BeftConfig"),
    _tuner("BOFT", "BOFTConfig", boft_block_size=4),
    _tuner("C3A", "C3AConfig", tolerance=1e-4, block_size=8, noise=3),
    _tuner("DEFT", "DeftConfig", tolerance=1e-4, r=4),
    _tuner("DeLoRA", "DeloraConfig", r=4),
    _tuner("FourierFT", "FourierFTConfig", n_frequency=64),
    _tuner("FRoD", "FrodConfig"),
    _tuner("GLoRA", "GloraConfig", r=4),
    _tuner("GraLoRA", "GraloraConfig", r=4),
    _tuner("HiRA", "HiraConfig", r=4, noise=1),
    _tuner("HRA", "HRAConfig", r=4),
    _tuner("IA3", "IA3Config"),
    _tuner("LN tuning", "LNTuningConfig"),
    _tuner("LoHa", "LoHaConfig", r=4),
    _tuner("LoKr", "LoKrConfig", r=4),
    _tuner("MiSS (Bone)", "MissConfig", r=4),
    _tuner("OFT", "OFTConfig", r=0, oft_block_size=4),
    _tuner("OSF", "OSFConfig"),
    _tuner("PEANuT", "PeanutConfig", r=4),
    _tuner("PSOFT", "PsoftConfig", tolerance=1e-3, dtype=torch.float32, r=4, noise=1),
    _tuner("PVeRA", "PveraConfig", r=4, noise=1),
    _tuner("RandLoRA", "RandLoraConfig", r=4),
    _tuner("RoAd", "RoadConfig", group_size=8),
    _tuner("SHiRA", "ShiraConfig", r=4),
    _tuner("Supertuning", "SupertuningConfig"),
    _tuner("TinyLoRA", "TinyLoraConfig", r=4),
    _tuner("UniLoRA", "UniLoraConfig", r=4, noise=1),
    _tuner("VB-LoRA", "VBLoRAConfig", r=4, vector_length=8, num_vectors=16, topk=2),
    _tuner("VeRA", "VeraConfig", r=4, noise=1),
    _tuner("WaveFT", "WaveFTConfig", n_frequency=64),
]
REFUSED_ADAPTERS = [
    Row(
        "Lily on a down projection",
        "Adapters",
        "peft",
        "refused",
        peft_model("LilyConfig", r=4),
        note="not linear in its inputs; `Pop(scorer='activation')` prunes it, masked",
        options={"match": "not linear"},
    ),
    Row(
        "Poly on a down projection",
        "Adapters",
        "peft",
        "refused",
        note="its weights hang on the task of each call; `Pop(scorer='activation')` prunes it, masked",
    ),
    Row(
        "X-LoRA on a down projection",
        "Adapters",
        "peft",
        "refused",
        note="not linear in its inputs; `Pop(scorer='activation')` prunes it, masked",
    ),
    Row(
        "LoRA on `target_parameters` of routed experts",
        "Adapters",
        "peft",
        "refused",
        note="merge it first (`merge_and_unload()`)",
        options={"match": "merge_and_unload"},
    ),
]


# packed weights -----------------------------------------------------------------------------------------------------


def _dense(model: Any) -> list[Any]:
    """The FFN of each layer; of one with routed experts, its shared one."""
    return [getattr(layer.mlp, "shared_expert", layer.mlp) for layer in model.model.layers]


def _replaced(model: nn.Module, projections: tuple[str, ...], make: Callable[[Any], Any]) -> nn.Module:
    for ffn in _dense(model):
        for name in projections:
            setattr(ffn, name, make(getattr(ffn, name)))
    return model.eval()


def dequantised(read: Callable[[Any], torch.Tensor]) -> Callable[..., Any]:
    """The twin whose plain weights are what ``read`` says of each packed module."""

    def twin(packed: Any, original: Any) -> Any:
        found = copy.deepcopy(original)
        with torch.no_grad():
            for name, module in found.named_modules():
                if name.split(".")[-1] in PROJECTIONS and type(module) is nn.Linear:
                    other = packed.get_submodule(name)
                    plain = type(other) is nn.Linear and type(other._parameters.get("weight")) is nn.Parameter
                    if not plain or hasattr(other, "quantization_status"):
                        module.weight.copy_(read(other).to(module.weight))
        return found

    return twin


def _named(projections: tuple[str, ...]) -> Callable[[nn.Module, str], bool]:
    return lambda module, name: name.split(".")[-1] in projections


def _torchao(config: str, **settings: Any) -> Callable[..., Any]:
    def make(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
        from torchao import quantization

        quantization.quantize_(model, getattr(quantization, config)(**settings), filter_fn=_named(projections))
        return model

    return make


def _packed(
    name: str,
    package: str,
    make: Any,
    read: Any,
    exact: bool = True,
    tests: str = "",
    note: str = "",
    outcome: str = "masked",
) -> Row:
    options = {"exact": exact}
    tests = tests or "test_wrapped_weights.py"
    return Row(name, "Packed weights", package, outcome, make, dequantised(read), note, options, tests)


def _of_weight(module: Any) -> torch.Tensor:
    return module.weight.dequantize()


TORCHAO = [
    _packed(
        "int8 weight-only",
        "torchao",
        _torchao("Int8WeightOnlyConfig"),
        _of_weight,
        note="a scale for each output, as by default ([int8](quantised.md))",
        outcome="fast",
    ),
    _packed(
        "int4 weight-only",
        "torchao",
        _torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4),
        _of_weight,
        note="`IntxWeightOnlyConfig`, which a CPU runs",
    ),
    _packed("float8 weight-only", "torchao", _torchao("Float8WeightOnlyConfig"), _of_weight),
    _packed(
        "int8 weights, int8 activations",
        "torchao",
        _torchao("Int8DynamicActivationInt8WeightConfig"),
        _of_weight,
        False,
    ),
]


def _quantize_dynamic(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
    for ffn in _dense(model):
        torch.ao.quantization.quantize_dynamic(ffn, set(projections), dtype=torch.qint8, inplace=True)
    return model


def _qat(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
    def make(linear: Any) -> Any:
        linear.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        wrapped = torch.ao.nn.qat.Linear.from_float(linear)
        wrapped.apply(torch.ao.quantization.disable_observer)
        wrapped.weight_fake_quant.enable_observer()
        wrapped.weight_fake_quant(wrapped.weight)
        wrapped.weight_fake_quant.disable_observer()
        return wrapped

    return _replaced(model, projections, make)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``2 W``."""
        return 2 * weight


def _parametrised(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
    def make(linear: Any) -> Any:
        nn.utils.parametrizations.weight_norm(linear)
        parametrize.register_parametrization(linear, "weight", Doubled())
        return linear

    return _replaced(model, projections, make)


def _pruned(name: str) -> Callable[..., Any]:
    def make(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
        def prune(linear: Any) -> Any:
            return torch_prune.l1_unstructured(linear, name, amount=0.5)

        return _replaced(model, projections, prune)

    return make


def _own_weight(module: Any) -> torch.Tensor:
    return module.weight.detach()


TORCH = [
    _packed(
        "`torch.ao.quantization.quantize_dynamic`", "torch", _quantize_dynamic, lambda m: m.weight().dequantize(), False
    ),
    _packed("`torch.ao.nn.qat.Linear`", "torch", _qat, lambda m: m.weight_fake_quant(m.weight), True),
    _packed("`torch.nn.utils.parametrize`, weight norm", "torch", _parametrised, _own_weight),
    _packed("`torch.nn.utils.prune` on weights", "torch", _pruned("weight"), _own_weight),
]


# with the extra [packages] ------------------------------------------------------------------------------------------


def _quanto(kind: str) -> Callable[..., Any]:
    def make(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
        from optimum import quanto

        quanto.quantize(model, weights=getattr(quanto, kind), include=[f"*.{name}" for name in projections])
        quanto.freeze(model)
        return model

    return make


def _hqq(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make(linear: Any) -> Any:
        config = BaseQuantizeConfig(nbits=4, group_size=32)
        return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)

    return _replaced(model, projections, make)


def _bnb(bits: int) -> Callable[..., Any]:
    def make(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
        from bitsandbytes import nn as bnb

        def replace(linear: Any) -> Any:
            size, bias = (linear.in_features, linear.out_features), linear.bias is not None
            if bits == 4:
                new = bnb.Linear4bit(*size, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
            else:
                new = bnb.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
                new.weight = bnb.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            new.bias = linear.bias
            return new.to("cpu")

        return _replaced(model, projections, replace)

    return make


def _read_bnb4(module: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, module.weight.quant_state)


def _read_bnb8(module: Any) -> torch.Tensor:
    packed, scale = module.state.CB, module.state.SCB
    packed, scale = (module.weight.data, module.weight.SCB) if packed is None else (packed, scale)
    return packed.float() * scale[:, None] / 127


def _compressed(kind: str) -> Callable[..., Any]:
    def make(model: nn.Module, projections: tuple[str, ...] = PROJECTIONS) -> Any:
        import tempfile

        from compressed_tensors import quantization as q
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization.utils import calculate_qparams
        from transformers import AutoModelForCausalLM

        if kind == "int4":
            form = "pack-quantized"
            args = q.QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=32, symmetric=True)
        else:
            form, args = "naive-quantized", q.QuantizationArgs(num_bits=8, type="float", strategy="channel")
        targets = [f"re:.*mlp.*{name}" for name in projections]
        scheme = q.QuantizationScheme(targets=targets, weights=args)
        config = q.QuantizationConfig(config_groups={"all": scheme}, format=form, quantization_status="frozen")
        q.apply_quantization_config(model, config)
        for module in model.modules():
            if hasattr(module, "weight_scale"):
                groups = module.weight.detach().unflatten(1, (-1, 32 if kind == "int4" else module.in_features))
                module.weight_scale.data.copy_(calculate_qparams(groups.amin(-1), groups.amax(-1), args)[0])
                module.quantization_status = q.QuantizationStatus.FROZEN
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=form)
        compressor.compress_model(model)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            compressor.update_config(folder)
            return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    return make


def _read_compressed(module: Any) -> torch.Tensor:
    from compressed_tensors.compressors import decompress_module

    module = copy.deepcopy(module)
    if module.quantization_status.name == "COMPRESSED":
        decompress_module(module)
    return module.weight.detach()


_PACKAGES = "packages/test_packed_weights.py"
PACKAGES = [
    _packed("int8 weights", "optimum-quanto", _quanto("qint8"), _of_weight, tests=_PACKAGES),
    _packed("int4 weights", "optimum-quanto", _quanto("qint4"), _of_weight, tests=_PACKAGES),
    _packed("4 bits", "hqq", _hqq, lambda m: m.dequantize(), tests=_PACKAGES),
    _packed("4 bits (nf4)", "bitsandbytes", _bnb(4), _read_bnb4, False, tests=_PACKAGES),
    _packed("8 bits", "bitsandbytes", _bnb(8), _read_bnb8, False, tests=_PACKAGES),
    _packed("int4, packed", "compressed-tensors", _compressed("int4"), _read_compressed, tests=_PACKAGES),
    _packed("float8", "compressed-tensors", _compressed("float8"), _read_compressed, tests=_PACKAGES),
]


# tested by themselves -----------------------------------------------------------------------------------------------


def _offload(name: str, outcome: str = "masked", note: str = "") -> Row:
    return Row(name, "Offloaded weights", "accelerate", outcome, note=note)


OTHERS = [
    Row(
        "`FP8Linear`",
        "Packed weights",
        "transformers",
        "masked",
        note="where its kernels run; on a CPU, where the model itself does not run, refused",
    ),
    Row(
        "GGUF, blocks kept (`GgufLinear`)",
        "Packed weights",
        "transformers",
        "masked",
        note="where its kernels run; else refused",
    ),
    Row(
        "`FP8Experts`, mxfp4 and GGUF experts",
        "Packed weights",
        "transformers",
        "refused",
        note="load them dequantised",
    ),
    Row("`torch.nn.utils.prune` on biases alone", "Packed weights", "torch", "masked"),
    Row(
        "GGUF, dequantised when loaded (the default)", "Packed weights", "transformers", "fast", tests="test_samples.py"
    ),
    _offload("`cpu_offload`"),
    _offload("`disk_offload`"),
    _offload("`cpu_offload_with_hook`", "fast"),
    _offload("`dispatch_model` with a device map"),
    _offload("`attach_layerwise_casting_hooks`"),
]
_WRAPPERS, _CALLS, _INSIDE, _MEMORY = "Wrappers of a model", "Calls", "Changes inside a session", "Memory of weights"


_SPREAD = "in each process ([Serving](serving.md#a-model-on-several-processes))"


def _call(group: str, name: str, outcome: str, tests: str, note: str = "", package: str = "torch") -> Row:
    return Row(name, group, package, outcome, note=note, tests=f"test_{tests}.py")


# Calls and wrappers of whole models, with the file that tests each.
CALLS = [
    _call(_WRAPPERS, "`peft.PeftModel`", "masked", "wrappers", "FFNs without an adapter fast", "peft"),
    _call(_WRAPPERS, "`peft.PeftModel` with prompt learning, X-LoRA", "refused", "wrappers", "", "peft"),
    _call(_WRAPPERS, "`torch.compile(model)`", "fast", "wrappers", "runs eagerly inside the session"),
    _call(
        _WRAPPERS, "Parts that were compiled (`mlp.compile()`)", "fast", "precompiled", "run eagerly, with a warning"
    ),
    _call(_WRAPPERS, "Compiled functions that call the model", "fast", "precompiled", "run eagerly inside the session"),
    _call(_WRAPPERS, "`DataParallel`, `DistributedDataParallel`", "refused", "wrappers", "pass `model.module`"),
    _call(_WRAPPERS, "`pipeline(...)` on a pruned model", "fast", "wrappers", "pass `pipe.model`", "transformers"),
    _call(_WRAPPERS, 'Tensor parallelism (`tp_plan="auto"`)', "masked", "tensor_parallel", _SPREAD, "transformers"),
    _call(_WRAPPERS, "Expert parallelism (`ep_size`)", "masked", "tensor_parallel", _SPREAD, "transformers"),
    _call(_WRAPPERS, "Pipeline parallelism, FSDP", "refused", "wrappers", "", "transformers"),
    _call(_MEMORY, "A module that several layers share", "masked", "sharing", "as if each layer had its own"),
    _call(_MEMORY, "Parameters that another model holds too", "masked", "sharing", "`load_state_dict(assign=True)`"),
    _call(_MEMORY, "`share_memory()`", "masked", "sharing"),
    _call(_MEMORY, "Memory mapped from a file, for reading or shared", "masked", "sharing"),
    _call(_MEMORY, "Memory mapped from a file, private", "fast", "sharing"),
    _call(_CALLS, "Arguments of `generate` by position", "fast", "phase_generate", "", "transformers"),
    _call(
        _CALLS, "`generate` taken before the session or from the class", "fast", "phase_generate", "", "transformers"
    ),
    _call(
        _CALLS,
        "The same with guidance and without a cache",
        "refused",
        "phase_generate",
        "call `model.generate`",
        "transformers",
    ),
    _call(_CALLS, "`generate(logits_to_keep=k)`", "fast", "phase_generate", "", "transformers"),
    _call(_CALLS, "`torch.autocast`, within a session or around it", "fast", "changes", "POP; thresholds masked"),
    _call(_CALLS, "A cache cropped to where a prefill forward began", "fast", "phase_cropped", "", "transformers"),
    _call(
        _CALLS,
        "A cache cropped inside one prefill forward",
        "refused",
        "phase_cropped",
        "prefill the prefix alone",
        "transformers",
    ),
    _call(_CALLS, "A cache that drops tokens by itself (a window, sinks)", "fast", "phase_caches", "", "transformers"),
    _call(_CALLS, "The same, cropped", "refused", "phase_caches", "which tokens it holds is not known", "transformers"),
    _call(_CALLS, "An adapter for each row (`adapter_names`)", "refused", "changes", "norms differ by row", "peft"),
    _call(_INSIDE, "Weights, biases, activations, FFNs replaced", "fast", "changes", "followed by the next forward"),
    _call(_INSIDE, "Weights written in place", "fast", "changes", "refused once channels have moved"),
    _call(_INSIDE, "Multiples of weights in their place", "fast", "changes"),
    _call(_INSIDE, "Other weights made of them", "fast", "changes", "refused once channels have moved"),
    _call(_INSIDE, "Weights packed, parametrised or pruned", "masked", "changes", "refused once channels have moved"),
    _call(_INSIDE, "Adapters added, switched, disabled, merged", "masked", "changes", "", "peft"),
    _call(_INSIDE, "The forward of a module replaced", "masked", "changes", "refused where the session has its own"),
    _call(_INSIDE, "The forward of a class replaced", "masked", "changes", "fast where no projection is of that class"),
    _call(_INSIDE, "`cpu_offload`, `disk_offload`, `dispatch_model`", "masked", "changes", "", "accelerate"),
    _call(_INSIDE, "Hooks added to parts of an FFN", "masked", "hooks", "as hooks of before the session"),
    _call(_INSIDE, "Pre-hooks that change a masked input", "refused", "hooks", "register them before the session"),
    _call(_INSIDE, "`parameters()`, as a vector and back", "fast", "taken_weights", "in the model's own order"),
    _call(_INSIDE, "Parts compiled", "fast", "precompiled", "run eagerly from the next forward on"),
    _call(_INSIDE, "The model itself compiled", "refused", "precompiled", "compile it before the session"),
    _call(
        _INSIDE, "`copy.deepcopy`, `pickle`, `torch.save` of the model", "refused", "changes", "save its `state_dict()`"
    ),
]

ROWS = [*ADAPTERS, *REFUSED_ADAPTERS, *TORCH, *TORCHAO, *PACKAGES, *OTHERS, *CALLS]


def versions() -> dict[str, str]:
    """What constraints.txt pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def page() -> str:
    """docs/compatibility.md."""
    pinned = versions()
    text = [
        "# Compatibility",
        "",
        "What becomes of an FFN whose weights are wrapped or packed, or of a model that is called in this way. The tests make "
        "this page from their own list (`python tests/helpers/compatibility.py`), with these versions.",
        "",
        "- **fast**: decode steps run on narrow views of the weights, in place; of a call, as the weights allow.",
        "- **masked**: right, but every channel is still computed; no speed-up. Column norms are those of what the module "
        "computes; where its weight does not say it, the module is asked for them, once a session.",
        "- **refused**: an error before anything changes; of what changes inside a session, at the next forward.",
        "",
        "| Group | What | Package | Outcome | Note |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(ROWS, key=lambda row: list(dict.fromkeys(r.group for r in ROWS)).index(row.group)):
        package = f"{row.package} {pinned[row.package]}"
        text.append(f"| {row.group} | {row.name} | {package} | {row.outcome} | {row.note} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
    PAGE.write_text(page())
