"""The vLLM plug-in on a real model: its tokens against transformers', and the speed of one running request.

Run in the environment of ``make test-vllm``: ``python benchmarks/vllm_engine.py MODEL [tokens | speed] [--settings JSON]``.
``tokens`` asks for 1, 4 and 16 answers at once (prefix cache on, chunks of 64 tokens), then with so few KV blocks that requests
are preempted, and compares each answer with pop_mm's masked reference in transformers. ``--floor`` compares that reference with
itself on another attention kernel too: thresholds are so sharp that rounding alone changes tokens. ``speed`` measures decode
milliseconds of one request, dense and pruned engines in turn, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    VLLM_NO_USAGE_STATS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1"
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
TAILS = ("\n\nQuestion: Who is speaking?\nAnswer:", "\n\nSummary:", "\n\nThe next morning", "\n\nIn French:")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("what", nargs="?", choices=("tokens", "speed", "one"), default="tokens")
    parser.add_argument("--settings", type=json.loads, default={"budget": 0.65}, help="pop_mm's, as JSON")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def engine(model: str, settings: dict[str, Any] | None, **more: Any) -> Any:
    from vllm import LLM

    config = {} if settings is None else {"pop_mm": settings}
    plain = dict(dtype="float32", max_model_len=1024, enforce_eager=True, disable_log_stats=False)
    return LLM(model, additional_config=config, **{"kv_cache_memory_bytes": 2**30, **plain, **more})


def prompts(model: str) -> list[list[int]]:
    """Sixteen, of 120 to 250 tokens; those of four begin alike."""
    from transformers import AutoTokenizer

    from pop_mm.passages import load_passages

    tokenizer, text = AutoTokenizer.from_pretrained(model), max(load_passages().values(), key=len)
    starts = [text[300 * (i // 4) : 300 * (i // 4) + 500 + 120 * (i % 4)] for i in range(16)]
    return [tokenizer(start + TAILS[i % 4])["input_ids"] for i, start in enumerate(starts)]


def reference(arguments: argparse.Namespace, asked: list[list[int]], attention: str) -> list[list[int]]:
    import torch
    from transformers import AutoModelForCausalLM

    import pop_mm

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation=attention
    ).eval()
    count = arguments.new_tokens
    found = []
    with pop_mm.prune(model, **{**arguments.settings, "batch": "per_sequence", "backend": "masked"}):
        for prompt in asked:
            ids = torch.tensor([prompt])
            options = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False)
            found.append(model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist())
    return found


def compare(name: str, found: list[list[int]], wanted: list[list[int]], more: str = "") -> None:
    same = [
        next((i for i, (a, b) in enumerate(zip(*pair, strict=True)) if a != b), len(pair[0]))
        for pair in zip(found, wanted, strict=True)
    ]
    whole = sum(count == len(found[0]) for count in same)
    print(
        f"{name}: {whole} of {len(found)} answers equal; tokens up to the first difference {sum(same)} of "
        f"{len(found) * len(found[0])}{more}",
        flush=True,
    )


def tokens(arguments: argparse.Namespace) -> None:
    from vllm import SamplingParams

    asked, count = prompts(arguments.model), arguments.new_tokens
    wanted = reference(arguments, asked, "sdpa")
    if arguments.floor:
        compare("transformers, eager against sdpa attention", reference(arguments, asked, "eager"), wanted)
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)

    def ask(llm: Any, some: list[list[int]]) -> list[list[int]]:
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in some], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def counters(llm: Any) -> str:
        names = {"vllm:prefix_cache_hits": "tokens from the prefix cache", "vllm:num_preemptions": "preemptions"}
        found = {n: int(sum(m.value for m in llm.get_metrics() if m.name == n)) for n in names}
        return "; so far " + ", ".join(f"{found[n]} {words}" for n, words in names.items())

    common = dict(
        max_num_batched_tokens=64, max_num_seqs=16, block_size=32, tensor_parallel_size=arguments.tensor_parallel
    )
    llm = engine(arguments.model, arguments.settings, **common)
    for requests in (1, 4, 16):
        compare(f"vLLM, {requests} at once", ask(llm, asked[:requests]), wanted[:requests], counters(llm))
    llm.llm_engine.engine_core.shutdown()
    llm = engine(arguments.model, arguments.settings, **{**common, "num_gpu_blocks_override": 36})
    compare("vLLM, 36 KV blocks", ask(llm, asked), wanted, counters(llm))
    llm.llm_engine.engine_core.shutdown()


def one(arguments: argparse.Namespace) -> None:
    """Decode milliseconds of one request, after a warm-up; printed as JSON."""
    from vllm import SamplingParams

    llm = engine(arguments.model, arguments.settings, block_size=128, dtype=arguments.dtype, enable_prefix_caching=True)
    prompt = [100 + 37 * i % 40000 for i in range(200)]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        llm.generate(
            [{"prompt_token_ids": prompt}],
            SamplingParams(temperature=0, max_tokens=count, ignore_eos=True),
            use_tqdm=False,
        )
        return time.perf_counter() - start

    seconds(4)
    print(json.dumps([1000 * (seconds(66) - seconds(2)) / 64 for _ in range(4)]), flush=True)


def speed(arguments: argparse.Namespace) -> None:
    shown: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for settings in (None, arguments.settings):
            call = [
                sys.executable,
                __file__,
                arguments.model,
                "one",
                "--settings",
                json.dumps(settings),
                "--dtype",
                arguments.dtype,
            ]
            output = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            shown.setdefault(json.dumps(settings), []).extend(json.loads(output.strip().splitlines()[-1]))
    dense = shown["null"]
    for name, times in shown.items():
        print(
            f"{name}: median {statistics.median(times):.2f} ms a token, lowest {min(times):.2f}; dense / this "
            f"{statistics.median(dense) / statistics.median(times):.2f} (lowest {min(dense) / min(times):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    given = parse()
    {"tokens": tokens, "speed": speed, "one": one}[given.what](given)
