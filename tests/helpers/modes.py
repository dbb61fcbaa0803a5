"""The ways to decode that every invariant is checked in. A mode takes a model and gives (tokens, logits)."""

from contextlib import contextmanager
from functools import cache
from unittest import mock

import pytest
import torch

import pop_mm.kernels as kernels
from helpers.covering import covering, covers
from helpers.observe import prompt
from helpers.tiny_models import tiny
from pop_mm import PopConfig, prune
from pop_mm.settings.keywords import nested

STEPS = 5
LENGTH = 9
RATIO = 0.4
BACKENDS = ("masked", "inplace")
LAYOUTS = ("llama", "phi3", "gpt2", "opt", "starcoder2", "gpt_neox", "falcon", "lfm2")  # one type for each layout
backends = pytest.mark.parametrize("backend", BACKENDS)
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")  # of experts
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
# concatenated, with a shared expert, transposed and interleaved and biased, with dense layers, ungated, transposed
EXPERT_LAYOUTS = ("mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "aria_text")
expert_layouts = pytest.mark.parametrize("model_type", EXPERT_LAYOUTS)
expert_cases = covers(model_type=EXPERT_LAYOUTS, implementation=IMPLEMENTATIONS, backend=BACKENDS)


def fresh(model_type="llama", **settings):
    """A model of its own, for tests that change it."""
    return tiny(model_type, torch.float64, **settings)


def with_experts(load, model_type, implementation="eager", dtype=None, **settings):
    """A tiny model with experts; float32 where torch has no kernel for float64."""
    dtype = dtype or (torch.float32 if implementation == "grouped_mm" else torch.float64)
    if model_type == "nemotron_h":
        settings = {"mlp_hidden_act": "gelu", **settings}  # a ReLU zeroes channels by itself
    return load(model_type, dtype, experts_implementation=implementation, **settings)


def config_of(**settings):
    """A config from settings by bare names, those of the method and of experts too, as command lines have them."""
    return PopConfig.from_dict(nested(settings))


def pruned(model, backend="masked", **settings):
    """A session whose ratio is that of each FFN; with torch's kernels, since the tests look at torch's products."""
    settings = {"ratio": RATIO, "scope": "ffn", "backend": backend, "kernels": "stock", **settings}
    return prune(model, config_of(**settings))


def without_library():
    """Within: as on a machine without a compiler."""
    return mock.patch.object(kernels, "library", return_value=None)


@contextmanager
def threads_of_torch(count):
    """Within: torch, and the compiled library with it, takes so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alone(model, ids, **settings):
    """Greedy tokens of one prompt in a session of its own."""
    with pruned(model, **settings):
        return generate(model, ids)[0]


def generate(model, ids, steps=STEPS, **settings):
    """Generated tokens [B, n] and logits [n, B, V]."""
    out = model.generate(ids, max_new_tokens=steps, return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences[:, ids.shape[1] :], torch.stack([logits.double() for logits in out.logits])


def left_padded(rows, pads=(3, 0)):
    """Ids and mask with ``pads[b]`` pads in front of row b."""
    ids, mask = rows.clone(), torch.ones_like(rows)
    for row, pad in enumerate(pads):
        ids[row, :pad] = mask[row, :pad] = 0
    return ids, mask


def padded(model, **settings):
    ids, mask = left_padded(prompt(2, LENGTH))
    return generate(model, ids, attention_mask=mask, **settings)


@torch.no_grad()
def loop(model, rows=2):
    """Prefill and single steps by hand."""
    ids = prompt(rows, LENGTH)
    out = model(ids, use_cache=True)
    tokens, logits = [], []
    for _ in range(STEPS):
        logits.append(out.logits[:, -1].double())
        tokens.append(logits[-1].argmax(-1, keepdim=True))
        if len(tokens) < STEPS:
            out = model(tokens[-1], past_key_values=out.past_key_values, use_cache=True)
    return torch.cat(tokens, 1), torch.stack(logits)


def assisted(model):
    settings = {"use_cache": True} if model.config.model_type == "mpt" else {}
    assistant = tiny(model.config.model_type, torch.float64, seed=1, **settings)
    return generate(model, prompt(1, LENGTH), assistant_model=assistant)


def simple(rows=2, **settings):
    return lambda model: generate(model, prompt(rows, LENGTH), **settings)


def sampled(model):
    torch.manual_seed(0)
    return generate(model, prompt(2, LENGTH), do_sample=True, top_k=20)


# each mode, and how many rows of a greedy generation it must equal (None: it has no such equal)
MODES = {
    "greedy": (simple(), 2),
    "single": (simple(rows=1), 1),
    "loop": (loop, 2),
    "chunked": (simple(prefill_chunk_size=4), 2),
    "static": (simple(cache_implementation="static", disable_compile=True), 2),
    "no_cache": (simple(use_cache=False), 2),
    "assisted": (assisted, 1),
    "lookup": (simple(rows=1, prompt_lookup_num_tokens=3), 1),
    "padded": (padded, None),
    "sampled": (sampled, None),
    "beams": (simple(num_beams=3, num_return_sequences=2), None),
    "beam_sampled": (lambda model: (torch.manual_seed(0), simple(num_beams=2, do_sample=True)(model))[1], None),
}


@cache
def greedy_run(model, rows, backend, **settings):
    """A greedy generation of a pruned model, in a session of its own."""
    with pruned(model, backend, **settings):
        return simple(rows)(model)


@cache
def dense_run(mode, model):
    """The mode on the dense model, or a skipped test where transformers itself does not offer it."""
    try:
        return MODES[mode][0](model)
    except Exception as error:
        pytest.skip(f"transformers: {type(error).__name__} {str(error)[:80]}")


def in_modes(types, full, modes=tuple(MODES)):
    """Pairs of type and mode: types of ``full`` in every mode, the others in the first mode and, in turn, in one more.

    Modes differ in which forwards there are and in their caches, types of one layout in their attention: a pair of each
    mode with each type would prove nothing new.
    """
    for place, model_type in enumerate(types):
        in_turn = (modes[0], modes[1 + place % (len(modes) - 1)])
        yield from ((model_type, mode) for mode in (modes if model_type in full else in_turn))


def in_modes_and_backends(types, full, modes=tuple(MODES)):
    """Types, modes and backends: types of ``full`` meet every mode and backend, the others one of each in turn."""
    others = [model_type for model_type in types if model_type not in full]
    return covering([model_type for model_type in types if model_type in full], modes, BACKENDS) + [
        (model_type, modes[place % len(modes)], BACKENDS[(place + place // len(modes)) % len(BACKENDS)])
        for place, model_type in enumerate(others)
    ]


def in_turn(types, full, values):
    """Pairs of type and value: types of ``full`` with every value, the others with one of them in turn."""
    return [
        (model_type, value)
        for place, model_type in enumerate(types)
        for turn, value in enumerate(values)
        if model_type in full or turn == place % len(values)
    ]
