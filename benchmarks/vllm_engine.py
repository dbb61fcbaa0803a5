"""The vLLM plug-in on a real model: its tokens against transformers, and its speed.

Run in the environment of ``make test-vllm``: ``python benchmarks/vllm_engine.py MODEL [tokens | forced | speed] [--settings
JSON]``.

``tokens`` asks for 1, 4 and 16 answers at once (prefix cache on, chunks of 64 tokens), then with so few KV blocks that requests
are preempted, and compares each answer with pop_mm's masked reference in transformers. ``--floor`` compares that reference with
itself on another attention kernel too: thresholds are so sharp that rounding alone changes tokens.

``forced`` shows that it is rounding. vLLM and transformers get the same answers, token by token; thresholds, entries that pass
them and logits are compared at each step. So is transformers with itself, with noise of the size of rounding.

``speed`` measures the milliseconds of a decode step, dense and pruned engines in turn, each in a process of its own.
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
NOISE = 3e-7  # of the root mean square of a module's outputs; vLLM's differ by as much from transformers'
TAILS = ("\n\nQuestion: Who is speaking?\nAnswer:", "\n\nSummary:", "\n\nThe next morning", "\n\nIn French:")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a transformers model")
    parser.add_argument("what", nargs="?", choices=("tokens", "speed", "one", "forced"), default="tokens")
    parser.add_argument("--settings", type=json.loads, default={"budget": 0.65}, help="pop_mm's, as JSON")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--floor", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1, help="running ones, for speed")
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

    from pop_mm.samples import load_passages

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
    """Milliseconds of a decode step of all requests, after a warm-up; printed as JSON."""
    from vllm import SamplingParams

    llm = engine(arguments.model, arguments.settings, block_size=128, dtype=arguments.dtype, enable_prefix_caching=True)
    asked = [[100 + (37 + 2 * number) * i % 40000 for i in range(200)] for number in range(arguments.requests)]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        llm.generate(
            [{"prompt_token_ids": prompt} for prompt in asked],
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
                "--requests",
                str(arguments.requests),
            ]
            output = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            shown.setdefault(json.dumps(settings), []).extend(json.loads(output.strip().splitlines()[-1]))
    dense = shown["null"]
    for name, times in shown.items():
        print(
            f"{name}: median {statistics.median(times):.2f} ms a step, lowest {min(times):.2f}; dense / this "
            f"{statistics.median(dense) / statistics.median(times):.2f} (lowest {min(dense) / min(times):.2f})",
            flush=True,
        )


class Trace:
    """What an answer's decode steps saw, when its tokens are given.

    Attributes
    ----------
    scores, bounds : list of list of Tensor
        By step and input of the model: magnitudes ``[n]``, and the threshold.
    logits : list of Tensor
        By step.
    """

    def __init__(self) -> None:
        self.scores: list[list[Any]] = []
        self.bounds: list[list[Any]] = []
        self.logits: list[Any] = []

    def step(self) -> None:
        """A decode step begins."""
        self.scores.append([])
        self.bounds.append([])

    def add(self, scores: Any, bound: Any) -> None:
        """Note the next input of the step."""
        self.scores[-1].append(scores.flatten().clone())
        self.bounds[-1].append(bound.flatten()[0].clone())


def forced_in_transformers(model: Any, settings: dict[str, Any], prompt: list[int], answer: list[int]) -> Trace:
    import torch

    import pop_mm
    from pop_mm.decoding import threshold_engine
    from pop_mm.tracking.phase import Phase

    trace, plain = Trace(), threshold_engine.ThresholdEngine._mask

    def noted(self: Any, index: int, which: str, first: bool, forward: Any, step: Any, row: Any, *more: Any) -> Any:
        if first and step.phase is Phase.DECODE:
            inputs = self.state(index, forward).inputs[which]
            if inputs.threshold is None:
                self._decide(forward.state, [(index, which)])
            trace.add(threshold_engine.magnitudes(*more), inputs.threshold)
        return plain(self, index, which, first, forward, step, row, *more)

    threshold_engine.ThresholdEngine._mask = noted  # type: ignore[method-assign]
    try:
        with pop_mm.prune(model, **{**settings, "backend": "masked"}), torch.no_grad():
            cache = model(torch.tensor([prompt])).past_key_values
            for token in answer:
                trace.step()
                trace.logits.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].float())
    finally:
        threshold_engine.ThresholdEngine._mask = plain  # type: ignore[method-assign]
    return trace


def forced_in_vllm(llm: Any, prompt: list[int], answer: list[int]) -> Trace:
    import torch
    from vllm import SamplingParams
    from vllm.v1.sample.sampler import Sampler

    from pop_mm.engines.vllm.masked import MaskedEntries, magnitudes

    trace, mask, sample = Trace(), MaskedEntries._mask, Sampler.forward

    def noted(self: Any, values: Any, decided: Any, tokens: Any) -> Any:
        trace.add(magnitudes(values, self._weight), decided)
        return mask(self, values, decided, tokens)

    def given(self: Any, logits: Any, *more: Any, **settings: Any) -> Any:
        found = sample(self, logits, *more, **settings)
        if trace.scores:
            trace.logits.append(logits[0].float().clone())
        found.sampled_token_ids[:] = torch.tensor([[[*answer, 0][len(trace.scores)]]])
        trace.step()
        return found

    MaskedEntries._mask, Sampler.forward = noted, given  # type: ignore[method-assign]
    try:
        params = SamplingParams(temperature=0, max_tokens=len(answer) + 1, ignore_eos=True)
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    finally:
        MaskedEntries._mask, Sampler.forward = mask, sample  # type: ignore[method-assign]
    return trace


def add_noise(model: Any) -> None:
    """Let each linear module and norm of a model be as far off as another order of sums would make it."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def noisy(module: Any, inputs: Any, output: Any) -> Any:
        size = NOISE * output.square().mean(-1, keepdim=True).sqrt()
        return output + size * torch.randn(output.shape, generator=generator)

    for name, module in model.named_modules():
        if (isinstance(module, torch.nn.Linear) and name != "lm_head") or name.endswith("norm"):
            module.register_forward_hook(noisy)


class Differences:
    """Of two traces, over all answers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bounds: list[float] = []  # signed, relative
        self.flips = self.entries = self.balance = 0
        self.first: list[tuple[float, float]] = []  # distance to the threshold, and between the two, relative
        self.logits: list[float] = []
        self.same = self.steps = 0

    def add(self, a: Trace, b: Trace) -> None:
        """Compare two traces of one answer."""
        first = True
        assert [len(step) for step in a.scores[: len(a.logits)]] == [len(step) for step in b.scores[: len(a.logits)]]
        for step, (ours, theirs) in enumerate(zip(a.logits, b.logits, strict=True)):
            for x, y, t, u in zip(a.scores[step], b.scores[step], a.bounds[step], b.bounds[step], strict=True):
                if step == 0:
                    self.bounds.append(float(t / u - 1))
                above, other = x > t, y > u
                flipped = above != other
                self.entries += x.numel()
                self.flips += int(flipped.sum())
                self.balance += int(above.sum()) - int(other.sum())
                if first and bool(flipped.any()):
                    here = flipped.nonzero()[0, 0]
                    apart = abs(float(x[here] / t - y[here] / u))
                    self.first.append((abs(float(x[here] / t) - 1), apart))
                    first = False
            self.logits.append(float((ours - theirs).abs().max()))
            self.same += int(ours.argmax() == theirs.argmax())
            self.steps += 1

    def show(self) -> None:
        """Print them."""
        size = sorted(abs(each) for each in self.bounds)
        print(
            f"{self.name}: thresholds differ by {statistics.median(size):.1e} (median), {size[-1]:.1e} (most), "
            f"{statistics.fmean(self.bounds):+.1e} (mean, signed), relative\n"
            f"  entries on the other side: {1e6 * self.flips / self.entries:.1f} of a million; kept by the first less by the "
            f"second: {1e6 * self.balance / self.entries:+.2f} of a million\n"
            f"  first such entry of each answer: at most {max((a for a, _ in self.first), default=0):.1e} from its threshold "
            f"(median {statistics.median([a for a, _ in self.first] or [0]):.1e}); the two are at most "
            f"{max((b for _, b in self.first), default=0):.1e} apart\n"
            f"  logits differ by at most {max(self.logits):.3f} (median {statistics.median(self.logits):.4f}); "
            f"greedy token equal in {self.same} of {self.steps} steps",
            flush=True,
        )


def forced(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    asked = prompts(arguments.model)
    answers = reference(arguments, asked, "sdpa")
    models = {
        name: AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=torch.float32, attn_implementation="eager" if name == "eager" else "sdpa"
        ).eval()
        for name in ("sdpa", "eager", "noise")
    }
    add_noise(models["noise"])
    llm = engine(arguments.model, {**arguments.settings, "backend": "masked"}, enable_prefix_caching=False)
    pairs = {
        "eager": Differences("transformers, eager against sdpa attention"),
        "noise": Differences(f"transformers, every linear and norm module {NOISE:.0e} off, against itself"),
        "vLLM": Differences("vLLM against transformers, sdpa"),
    }
    for prompt, answer in zip(asked, answers, strict=True):
        traces = {n: forced_in_transformers(m, arguments.settings, prompt, answer) for n, m in models.items()}
        traces["vLLM"] = forced_in_vllm(llm, prompt, answer)
        for name, pair in pairs.items():
            pair.add(traces[name], traces["sdpa"])
    for pair in pairs.values():
        pair.show()
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    given = parse()
    {"tokens": tokens, "speed": speed, "one": one, "forced": forced}[given.what](given)
