"""The model ``pop`` of lmms-eval: the real package where it can be imported, else what stands in for it here.

The stand-ins have the signatures and return shapes of lmms_eval 0.7.3, in the files that their docstrings name.
"""

import functools
import importlib
import inspect
import json
import logging
import random
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor

import pop_mm
import pop_mm.evaluation
from helpers.modes import config_of
from helpers.observe import InDouble, differences, fingerprint
from helpers.tiny_vlm_folder import save_vlm
from pop_mm.samples import load_vision
from pop_mm.vision import InputError, decode, prepare

SHAPES = Path(pop_mm.__file__).parent / "data" / "tiny_vlm"
SCENES = Path(pop_mm.__file__).parent / "app" / "scenes"
QUESTIONS = [
    ("two-blue.png", "How many shapes are there?"),
    ("four-shapes.png", "Describe the picture."),
    ("square-triangle-cross.png", "Which shape is at the bottom?"),
]
CHOICES = [" a red circle", " blue", "There are two", ""]


# stand-ins ------------------------------------------------------------------------------------------------------------


@dataclass
class Instance:
    """``lmms_eval/api/instance.py``; its ``__post_init__`` reads the metadata."""

    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)
    resps: list = field(default_factory=list)
    filtered_resps: dict = field(default_factory=dict)
    raw_filtered_resps: dict = field(default_factory=dict)
    token_counts: list = field(default_factory=list)
    task_name: str | None = None
    doc_id: object = None
    repeats: object = None
    doc: dict | None = None

    def __post_init__(self):
        keys = ("task", "doc_id", "repeats")
        self.task_name, self.doc_id, self.repeats = (self.metadata[key] for key in keys)

    @property
    def args(self):
        return self.arguments


def unwrap_generation_output(output):
    """``lmms_eval/api/instance.py``: whatever is not an answer becomes text."""
    return (output, None) if isinstance(output, str) else (str(output), None)


class Lmms:
    """``class lmms`` of ``lmms_eval/api/model.py``."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}
        self.cache_hook = SimpleNamespace(add_partial=lambda attr, req, res: None)

    @property
    def rank(self):
        return self._rank

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        args = dict(part.split("=", 1) for part in arg_string.split(","))
        args["ratio"] = float(args["ratio"])
        return cls(**args, **{k: v for k, v in (additional_config or {}).items() if v is not None})

    def clean(self):
        for name in [name for name, value in vars(self).items() if isinstance(value, torch.nn.Module)]:
            delattr(self, name)


@dataclass(frozen=True)
class ModelManifest:
    """``lmms_eval/models/registry_v2.py``."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


class Registry(dict):
    """``class ModelRegistryV2`` of ``lmms_eval/models/registry_v2.py``."""

    def register_manifest(self, manifest, *, overwrite=False):
        self[manifest.model_id] = manifest

    def get_model_class(self, model_name, force_simple=False):
        manifest = self[model_name]
        path = manifest.simple_class_path if force_simple else manifest.chat_class_path
        module, name = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)


def evaluate(
    lm, task_dict, limit=None, bootstrap_iters=100000, log_samples=True, cli_args=None, response_cache=None
):  # of the real one's 18 parameters, those that matter here
    """``evaluate`` of ``lmms_eval/evaluator.py``: build, ask, clean, and the keys of ``results_dict``."""
    results, samples = {}, {}
    for task in task_dict.values():
        task.build_all_requests(limit=limit, offset=0, rank=0, world_size=1)
        ask = functools.partial(getattr(lm, task.instances[0].request_type), task.instances)
        found = response_cache.execute(ask) if response_cache is not None else ask()
        for x, req in zip(found, task.instances, strict=True):
            text, counts = sys.modules["lmms_eval.evaluator"].unwrap_generation_output(x)
            req.resps.append(text)
            req.token_counts.append(counts)
    lm.clean()
    for name, task in task_dict.items():
        for req in task.instances:
            req.filtered_resps["none"] = req.resps[0]
        scores = [task.score(req.filtered_resps["none"]) for req in task.instances]
        results[name] = {
            "alias": name,
            "score,none": sum(scores),
            "score_stderr,none": 0.5,
            "score_stderr_clt,none": "N/A",
        }
        samples[name] = [
            {"doc_id": req.doc_id, "arguments": req.args[:1], "filtered_resps": [req.filtered_resps["none"]]}
            for req in task.instances
        ]
    better = {name: {"score": True} for name in task_dict}
    return {"results": results, "higher_is_better": better, "samples": samples, "n-shot": {}, "configs": {}}


class Task:
    """What ``evaluate`` uses of ``class Task`` of ``lmms_eval/api/task.py``; its few-shot examples are drawn at random."""

    def __init__(self, requests, score=len):
        self._make, self.score, self.instances, self.rnd = requests, score, [], random.Random(0)

    def build_all_requests(self, **_):
        self.instances = self._make(f"{self.rnd.random()}")


def stand_ins():
    """Modules by name."""
    registry = Registry()
    found = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": Instance, "unwrap_generation_output": unwrap_generation_output},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {"MODEL_REGISTRY_V2": registry},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.evaluator": {"evaluate": evaluate, "unwrap_generation_output": unwrap_generation_output},
        "lmms_eval.cli": {},
        "lmms_eval.cli.dispatch": {"main": lambda: print(sys.argv)},
    }
    modules = {name: ModuleType(name) for name in found}
    for name, values in found.items():
        vars(modules[name]).update(values)
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, modules[name])
    return modules


def forget(patch):
    """Import the plug-in anew next time; what was there comes back afterwards."""
    for name in ("lmms_harness", "lmms_model", "lmms_requests", "lmms_results"):
        patch.delitem(sys.modules, f"pop_mm.evaluation.{name}", raising=False)
        patch.delattr(pop_mm.evaluation, name, raising=False)


@pytest.fixture(scope="module")
def harness():
    """The plug-in, and the lmms-eval that it runs in."""
    with pytest.MonkeyPatch.context() as patch:
        forget(patch)
        try:
            importlib.import_module("lmms_eval.evaluator")
        except ImportError:
            for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
                patch.delitem(sys.modules, name)
            for name, module in stand_ins().items():
                patch.setitem(sys.modules, name, module)
        patch.setattr(sys.modules["lmms_eval.evaluator"], "evaluate", sys.modules["lmms_eval.evaluator"].evaluate)
        module = importlib.import_module("pop_mm.evaluation.lmms_harness")
        yield module
        for name in [name for name in sys.modules if name.startswith("pop_mm.evaluation.lmms_")]:
            del sys.modules[name]


@pytest.fixture
def real(harness):
    """The real lmms-eval, or the test is skipped."""
    if not hasattr(sys.modules["lmms_eval"], "__file__"):
        pytest.skip("lmms-eval is not installed")
    return sys.modules["lmms_eval.evaluator"]


@pytest.fixture
def evaluator(harness, monkeypatch):
    """lmms-eval's evaluator module with the stand-in's ``evaluate``, wrapped: it takes simpler tasks than the real one."""
    module = sys.modules["lmms_eval.evaluator"]
    monkeypatch.setattr(module, "unwrap_generation_output", unwrap_generation_output)
    monkeypatch.setattr(module, "evaluate", evaluate)
    sys.modules["pop_mm.evaluation.lmms_results"].wrap_evaluator()
    return module


# models and requests --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    """The shipped model, which gives real answers."""
    return load_vision(str(SHAPES), dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_vlm(tmp_path_factory.mktemp("vlm"), torch.float64)


@pytest.fixture(scope="module")
def double(folder):
    """A random model in float64 with the same kind of processor."""
    return load_vision(folder, dtype="float64")


@pytest.fixture
def make(harness, shapes):
    """``make(ratio=0.4, ...)``; the test fails if it does not leave the model bit for bit what it was."""
    used = []

    def make(model=shapes, simple=False, **settings):
        used.append((model[0], fingerprint(model[0])))
        kind = harness.PopVLMSimple if simple else harness.PopVLM
        lm = kind(model[0], processor=model[1], **settings)
        lm.task_dict = {name: {"test": documents()} for name in ("scenes", "other")}
        return lm

    yield make
    changed = {key for model, before in used for key in differences(before, fingerprint(model))}
    assert not {key for key in changed if "rope_deltas" not in key}  # those are of any generate


def documents():
    return [{"image": Image.open(SCENES / name), "question": question} for name, question in QUESTIONS]


def to_visuals(document):
    return [document["image"]]


def to_messages(document):
    parts = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": parts}]


def request(arguments, number, task="scenes", kind="generate_until"):
    made = sys.modules["lmms_eval.api.instance"].Instance
    return made(kind, arguments, idx=0, metadata={"task": task, "doc_id": number, "repeats": 1})


def questions(simple=False, task="scenes", **settings):
    """Requests as ``construct_requests`` of ``lmms_eval/api/task.py`` makes them for simple and for chat models."""
    settings = {"until": ["\n\n"], "max_new_tokens": 12, "temperature": 0, "do_sample": False, **settings}
    made = []
    for number, (_, text) in enumerate(QUESTIONS):
        middle = (f"<image>{text}", settings, to_visuals) if simple else (text, to_messages, settings)
        made.append(request((*middle, number, task, "test"), number, task))
    return made


def choices(number=0, texts=CHOICES, task="scenes"):
    """As ``construct_requests`` makes them for ``multiple_choice``."""
    text = QUESTIONS[number][1]
    return [request((text, c, to_visuals, number, task, "test"), number, task, "loglikelihood") for c in texts]


def expected_answers(model, processor, new=12, **settings):
    answers = []
    for name, question in QUESTIONS:
        inputs = prepare(processor, SCENES / name, question, model=model)
        with pop_mm.prune(model, config_of(**settings)):
            answers += decode(processor, model.generate(**inputs, max_new_tokens=new, do_sample=False), inputs)
    return answers


class Force(LogitsProcessor):
    """Makes ``generate`` say given tokens, and leave the logits alone."""

    def __init__(self, prompt, tokens):
        self.prompt, self.tokens = prompt, tokens

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0
        return forced


def loss_step_by_step(model, processor, continuation, ratio, **settings):
    """Loss, and whether it is the greedy text, by real decode steps with a cache: generate, made to say the text."""
    name, question = QUESTIONS[0]
    inputs = prepare(processor, SCENES / name, question, model=model)
    tokens = processor.tokenizer(continuation, add_special_tokens=False)["input_ids"]
    said = [Force(inputs["input_ids"].shape[1], tokens)]
    how = dict(max_new_tokens=len(tokens), do_sample=False, output_logits=True, return_dict_in_generate=True)
    with InDouble(), pop_mm.prune(model, config_of(ratio=ratio, **settings)):
        steps = model.generate(**inputs, logits_processor=said, **how).logits
    losses = [-step[0].log_softmax(-1)[token] for step, token in zip(steps, tokens, strict=True)]
    return float(sum(losses) / len(losses)), [int(step.argmax()) for step in steps] == tokens


# answers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simple", [False, True])
def test_answers_are_those_of_generate_in_a_session(make, shapes, simple):
    expected = expected_answers(*shapes, ratio=0.4)
    assert expected != expected_answers(*shapes, ratio=0)
    lm = make(ratio=0.4, simple=simple)
    assert lm.generate_until(questions(simple)) == expected
    assert make(ratio=0.4, simple=simple, batch="shared").generate_until(questions(simple)) == expected
    with lm.dense():
        assert lm.generate_until(questions(simple)) == expected_answers(*shapes, ratio=0)


@pytest.mark.parametrize("size", [2, "3"])
def test_answers_do_not_depend_on_the_batch(make, double, size):
    lm = make(double, ratio=0.4, batch_size=size)
    rows = []
    generate = lm.model.generate
    lm.model.generate = lambda **inputs: rows.append(len(inputs["input_ids"])) or generate(**inputs)
    expected = expected_answers(*double, ratio=0.4)
    rows.clear()
    try:
        assert lm.generate_until(questions()) == expected
    finally:
        del lm.model.generate
    assert max(rows) == int(size)
    assert make(double, ratio=0.4, batch_size=size, batch="shared").generate_until(questions()) != expected


def test_requests_with_other_settings_are_answered_apart_and_in_order(make, shapes):
    long, short = expected_answers(*shapes, ratio=0.4), expected_answers(*shapes, new=2, ratio=0.4)
    mixed = [
        request for pair in zip(questions(), questions(max_new_tokens=2, task="other"), strict=True) for request in pair
    ]
    lm = make(ratio=0.4, batch_size=2)
    assert lm.generate_until(mixed) == [answer for pair in zip(long, short, strict=True) for answer in pair]
    assert lm.tallies["other"].generated_tokens == 6


def test_without_a_ratio_to_leave_out_it_is_the_dense_model(make, shapes):
    lm = make(ratio=0)
    assert not lm.prunes
    assert lm.generate_until(questions()) == expected_answers(*shapes, ratio=0)
    assert lm.tallies["scenes"].pruned_generated_tokens == 0
    assert lm.pop_info()["warnings"] == []


@pytest.mark.parametrize("size", [1, 3])
def test_an_answer_ends_before_what_the_task_says(make, shapes, size):
    lm = make(ratio=0.4, batch_size=size)
    steps = []
    forward = lm.model.forward
    lm.model.forward = functools.wraps(forward)(lambda *args, **kwargs: steps.append(1) or forward(*args, **kwargs))
    try:
        whole = lm.generate_until(questions())
        before, steps[:] = len(steps), []
        found = lm.generate_until(questions(until=[" a", " three", ""]))
    finally:
        del lm.model.forward
    assert found == [answer.split(" a")[0].split(" three")[0] for answer in whole]
    assert found != whole
    assert len(steps) < before
    assert lm.generate_until(questions(until="T")) == [answer.split("T")[0] for answer in whole]


def test_the_length_of_an_answer_without_a_limit_is_the_models_setting(make, shapes):
    lm = make(ratio=0.4, max_new_tokens=2)
    assert lm.generate_until(questions(max_new_tokens=None)) == expected_answers(*shapes, new=2, ratio=0.4)


@pytest.mark.parametrize(
    ("asked", "sample"),
    [
        ({}, False),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True, "top_p": 0.9}, True),
    ],
)
def test_answers_are_greedy_unless_the_task_says_otherwise(harness, asked, sample):
    generate_settings = sys.modules["pop_mm.evaluation.lmms_requests"].generate_settings
    found = generate_settings({**asked, "num_beams": 2, "image_aspect_ratio": "pad", "until": ["x"]}, 7)
    assert found["do_sample"] is sample
    assert found["max_new_tokens"] == 7
    assert found["num_beams"] == 2
    assert (found.get("temperature"), found.get("top_p")) == (
        (asked.get("temperature"), asked.get("top_p")) if sample else (None, None)
    )
    assert not {"image_aspect_ratio", "until"} & found.keys()


def test_videos_audio_and_several_rounds_are_refused(make):
    lm = make(ratio=0.4)
    for medium in ("video", "audio"):
        messages = [{"role": "user", "content": [{"type": medium, "url": "a.bin"}]}]
        asked = request(("", lambda _, messages=messages: messages, {}, 0, "scenes", "test"), 0)
        with pytest.raises(InputError, match=medium):
            lm.generate_until([asked])
    with pytest.raises(NotImplementedError, match="one round"):
        lm.generate_until_multi_round([])


# losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prefill": "partition"}, {"batch": "shared"}, {"gamma": 0.3, "ratio": 0.2}])
def test_a_continuation_costs_what_decoding_it_step_by_step_costs(make, double, settings):
    settings = {"ratio": 0.4, **settings}
    with InDouble():
        found = make(double, **settings).loglikelihood(choices())
    assert found[-1] == (0.0, True)  # no tokens
    for text, (loss, greedy) in zip(CHOICES[:-1], found, strict=False):
        expected, best = loss_step_by_step(*double, text, **settings)
        assert loss == pytest.approx(expected, abs=1e-9)
        assert greedy == best
        assert abs(loss - loss_step_by_step(*double, text, ratio=0)[0]) > 1e-4


def test_the_greedy_answer_is_known_as_such(make, shapes):
    answer = expected_answers(*shapes, ratio=0.4)[0]
    (loss, greedy), (other, no) = make(ratio=0.4).loglikelihood(choices(texts=[answer, "There are four shapes"]))
    assert greedy
    assert not no
    assert loss < other  # lmms-eval takes the smallest


def test_as_the_paper_scores_all_is_one_prefill_on_retained_and_candidate_channels(make, double):
    model, processor = double
    name, question = QUESTIONS[0]
    inputs = dict(prepare(processor, SCENES / name, question, model=model))
    ids = processor.tokenizer(CHOICES[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    more = torch.zeros_like(ids[:, 1:])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids[:, :-1]], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], more + 1], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], 1)
    with InDouble(), torch.no_grad(), pop_mm.prune(model, ratio=0.4, method=pop_mm.Pop(prefill="partition")):
        logits = model(**inputs).logits[0, -ids.shape[1] :]
    expected = torch.nn.functional.cross_entropy(logits, ids[0])
    lm = make(double, ratio=0.4, loglikelihood="prefill")
    with InDouble():
        ((loss, _),) = lm.loglikelihood(choices(texts=CHOICES[:1]))
    assert loss == pytest.approx(float(expected), abs=1e-9)
    assert abs(loss - loss_step_by_step(*double, CHOICES[0], ratio=0.4, prefill="partition")[0]) > 1e-4
    assert lm.tallies["scenes"].pruned_token_share == lm.tallies["scenes"].prefill_requests == 1


def test_targets_may_be_functions_and_contexts_empty(make, double):
    lm = make(double, ratio=0.4)
    named = request(("q", lambda doc: doc["question"], to_visuals, 0, "scenes", "test"), 0, kind="loglikelihood")
    plain = request(("q", QUESTIONS[0][1], to_visuals, 0, "scenes", "test"), 0, kind="loglikelihood")
    alone = request(("", "yes"), 0, kind="loglikelihood")
    found = lm.loglikelihood([named, plain, alone])
    assert found[0] == found[1]
    assert found[2][0] > 0


def test_inputs_that_speak_of_each_token_grow_with_the_continuation(harness):
    extended = sys.modules["pop_mm.evaluation.lmms_requests"].extended
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "attention_mask": torch.ones(1, 3, dtype=torch.long),
        "token_type_ids": torch.tensor([[1, 1, 0]]),
        "cross_attention_mask": torch.tensor([[[[0]], [[1]], [[1]]]]),
        "pixel_values": torch.zeros(1, 3, 4, 4),
        "pixel_attention_mask": torch.ones(1, 1, 4),
    }
    found = extended(inputs, torch.tensor([[8, 9]]))
    assert found["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert found["attention_mask"].tolist() == [[1] * 5]
    assert found["token_type_ids"].tolist() == [[1, 1, 0, 0, 0]]
    assert found["cross_attention_mask"].flatten().tolist() == [0, 1, 1, 1, 1]
    assert found["pixel_values"] is inputs["pixel_values"]
    assert found["pixel_attention_mask"] is inputs["pixel_attention_mask"]


# what was pruned ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefill", "share"), [("dense", 0), ("partition", 1)])
def test_a_task_whose_answers_are_hardly_pruned_is_warned_of(make, caplog, prefill, share):
    lm = make(ratio=0.4, prefill=prefill)
    with caplog.at_level(logging.WARNING):
        lm.generate_until(questions(max_new_tokens=1))
        lm.loglikelihood(choices(texts=["There"], task="other"))
    assert lm.tallies["scenes"].pruned_generated_share == share
    assert lm.tallies["other"].pruned_token_share == share
    said = [line for line in caplog.messages if "prefill=partition" in line]
    assert len(said) == (0 if share else 3)  # the first task's twice
    assert lm.pop_info()["warnings"] == said[-2:]
    assert json.loads(json.dumps(lm.pop_info()))["pruned_token_share"] == share


def test_the_share_counts_all_tokens_but_the_first(make, shapes):
    lm = make(ratio=0.4)
    answers = lm.generate_until(questions())
    lengths = [len(shapes[1].tokenizer(answer)["input_ids"]) for answer in answers]
    scored = len(shapes[1].tokenizer("There are two")["input_ids"])
    lm.loglikelihood(choices(texts=["There are two"]))
    tally = lm.tallies["scenes"]
    assert (tally.generated_tokens, tally.pruned_generated_tokens) == (sum(lengths), sum(lengths) - 3)
    assert (tally.scored_tokens, tally.pruned_scored_tokens) == (scored, scored - 1)


# the evaluator --------------------------------------------------------------------------------------------------------


def tasks():
    """A task of questions whose wording is drawn at random, and one of choices."""

    def ask(drawn):
        return [
            request(
                (drawn, lambda doc, drawn=drawn: to_messages({**doc, "question": drawn}), {}, 0, "scenes", "test"), 0
            )
        ]

    return {
        "scenes": Task(ask),
        "other": Task(lambda _: choices(texts=CHOICES[:2], task="other"), score=lambda found: found[0]),
    }


def test_a_pruned_result_has_the_dense_one_beside_it(make, double, evaluator):
    lm = make(double, ratio=0.6, max_new_tokens=8)
    dense_lm, given = make(double, ratio=0, max_new_tokens=8), tasks()
    drawn = []
    given["scenes"].score = lambda answer: drawn.append(float(torch.rand(1))) or len(answer)
    found = evaluator.evaluate(lm=lm, task_dict=given)
    dense = evaluator.evaluate(dense_lm, tasks())
    assert len(drawn) == 2
    assert len(set(drawn)) == 1  # a task that samples draws the same for both
    answer = given["scenes"].instances[0].resps[0]
    length = len(lm.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
    assert found["pop"]["generated_tokens"] == length  # those of the dense model are not counted
    assert found["pop"]["decode_requests"] == 2
    for task in given:
        metrics = found["results"][task]
        assert metrics["score (dense),none"] == dense["results"][task]["score,none"]
        assert (metrics["score (dense)_stderr,none"], metrics["score (dense)_stderr_clt,none"]) == (0.5, "N/A")
        assert metrics["alias"] == task
        counted = found["pop"]["tasks"][task]
        share = counted["pruned_generated_share" if task == "scenes" else "pruned_token_share"]
        assert metrics["pruned_share,none"] == share > 0.5
        assert found["higher_is_better"][task] == {"score": True, "score (dense)": True}
        for sample, other in zip(found["samples"][task], dense["samples"][task], strict=True):
            assert sample["filtered_resps (dense)"] == other["filtered_resps"]
            assert sample["filtered_resps"] != other["filtered_resps"]
            assert sample["arguments"] == other["arguments"]  # the same draw
    assert found["results"]["other"]["score,none"] != found["results"]["other"]["score (dense),none"]
    assert found["pop"]["config"]["ratio"] == 0.6
    assert all(len(request.resps) == 1 for task in given.values() for request in task.instances)
    assert not hasattr(lm, "model")  # what lmms-eval wants: memory for a judge


def test_what_is_not_pruned_is_evaluated_once(make, evaluator):
    found = evaluator.evaluate(make(ratio=0), tasks())
    assert not [key for metrics in found["results"].values() for key in metrics if "dense" in key]
    other = Lmms()
    other.generate_until = lambda requests: ["x"] * len(requests)
    assert evaluator.evaluate(other, {"scenes": tasks()["scenes"]})["results"]["scenes"]["score,none"] == 1
    assert evaluator.unwrap_generation_output is unwrap_generation_output


def test_the_dense_run_reads_no_cache_of_the_pruned_one(make, evaluator):
    asked = []

    class Cache:
        def execute(self, ask):
            asked.append(ask)
            return ["from the cache"]

    found = evaluator.evaluate(make(ratio=0.4), {"scenes": tasks()["scenes"]}, response_cache=Cache())
    assert len(asked) == 1
    assert found["samples"]["scenes"][0]["filtered_resps"] == ["from the cache"]
    assert found["samples"]["scenes"][0]["filtered_resps (dense)"] != ["from the cache"]
    assert "pruned_share,none" not in found["results"]["scenes"]


def test_groups_and_nested_tasks(harness, make):
    results = sys.modules["pop_mm.evaluation.lmms_results"]
    one, two = Task(None), Task(None)
    assert list(results._tasks({"group": {"one": one}, "two": ("group", two), "none": (None, None)})) == [one, two]
    pruned = {"results": {"a": {"acc,none": 1}}, "groups": {"g": {"acc,none": 2, " ": " "}}}
    dense = {"results": {"a": {"acc,none": 3}}, "groups": {"g": {"acc,none": 4, "acc_expected_accuracy,none": 5}}}
    results._merge(pruned, dense, make(ratio=0.4))
    group = {"acc,none": 2, " ": " ", "acc (dense),none": 4, "acc (dense)_expected_accuracy,none": 5}
    assert pruned["groups"]["g"] == group


def test_the_real_evaluator(real, make, tmp_path):
    """A generative and a multiple-choice task from a file, through ``simple_evaluate``."""
    import datasets
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
    from lmms_eval.tasks import TaskManager

    rows = {
        "image": [str(SCENES / name) for name, _ in QUESTIONS],
        "question": [question for _, question in QUESTIONS],
        "choices": [["There are two shapes.", "There are four shapes."]] * 3,
        "gold": [0, 1, 1],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.map(lambda row: row).to_parquet(tmp_path / "scenes.parquet")
    common = {
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "scenes.parquet")}},
        "test_split": "test",
        "doc_to_visual": lambda doc: [doc["image"].convert("RGB")],
        "doc_to_text": "{{question}}",
    }
    metric = {"aggregation": "mean", "higher_is_better": True}
    said = {
        **common,
        "task": "said",
        "doc_to_target": "question",
        "generation_kwargs": {"max_new_tokens": 12},
        "metric_list": [{"metric": "exact_match", **metric}],
    }
    chosen = {
        **common,
        "task": "chosen",
        "output_type": "multiple_choice",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", **metric}],
    }
    manager = TaskManager("ERROR", model_name="pop")
    for simple, asked in ((False, [said]), (True, [said, chosen])):
        lm = make(ratio=0.4, simple=simple)
        kind = ConfigurableTask if simple else ConfigurableMessagesTask
        made = [kind(config=dict(task), model_name="pop") for task in asked]
        found = real.simple_evaluate(model=lm, tasks=made, task_manager=manager, bootstrap_iters=0)
        for task in asked:
            name = f"{task['metric_list'][0]['metric']} (dense)"
            assert f"{name},none" in found["results"][task["task"]]
            assert name in sys.modules["lmms_eval.utils"].make_table(found)
        answers = [sample["filtered_resps"][0] for sample in found["samples"]["said"]]
        dense = [sample["filtered_resps (dense)"][0] for sample in found["samples"]["said"]]
        assert answers == expected_answers(
            lm_model := load_vision(str(SHAPES), dtype="float32")[0], lm.processor, ratio=0.4
        )
        assert dense == expected_answers(lm_model, lm.processor, ratio=0)


# registration and settings --------------------------------------------------------------------------------------------


def test_the_manifest_names_the_classes(harness):
    registry = sys.modules["lmms_eval.models"].MODEL_REGISTRY_V2
    registry.register_manifest(harness.manifest(), overwrite=True)
    assert registry.get_model_class("pop") is harness.PopVLM
    assert registry.get_model_class("pop", force_simple=True) is harness.PopVLMSimple
    assert not harness.PopVLM.is_simple
    assert harness.PopVLMSimple.is_simple


def test_a_model_is_made_from_the_words_of_a_command_line(harness, folder):
    text = f"pretrained={folder},dtype=float32,ratio=0.4,modality_weights={json.dumps({'image': 0.5})}"
    lm = harness.PopVLM.create_from_arg_string(text, {"batch_size": "1", "max_batch_size": None, "device": "cpu"})
    assert (lm.pop_config.ratio, lm.pop_config.batch) == (0.4, "per_sequence")
    assert lm.pop_config.modality_weights == {"image": 0.5}
    assert (lm.model.dtype, lm.device.type, lm.batch_size) == (torch.float32, "cpu", 1)


def test_the_command_is_lmms_evals_with_the_model_registered(harness, monkeypatch, capsys):
    dispatch = importlib.import_module("lmms_eval.cli.dispatch")
    monkeypatch.setattr(dispatch, "main", lambda: print(sys.argv))
    monkeypatch.setattr(sys, "argv", before := ["python", "--tasks", "pope"])
    harness.main()
    harness.main(["models"])
    assert capsys.readouterr().out == "['lmms-eval', '--tasks', 'pope']\n['lmms-eval', 'models']\n"
    assert sys.argv is before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": 0.65, "loglikelihood": "prefill"}, "thresholds leave the prefill dense"),
        ({"budget": 0.65, "ratio": 0.2}, "Give one"),
        ({"settings": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"ratio": 0.4, "gama": 0.1}, "Did you mean 'gamma'"),
        ({"ratio": 0.4, "batch_size": "auto"}, "batch_size"),
        ({"ratio": 0.4, "batch_size": 0}, "batch_size"),
        ({"ratio": 0.4, "loglikelihood": "both"}, "'decode', 'prefill'"),
        ({"ratio": 0.4, "modality_weights": "image:0.5"}, "JSON"),
        ({"ratio": 0.99}, "ratio"),
        ({"ratio": 0.4, "processor": None}, "processor"),
    ],
)
def test_a_wrong_setting_is_an_error(harness, shapes, settings, says):
    with pytest.raises(pop_mm.ConfigError, match=says):
        harness.PopVLM(shapes[0], **{"processor": shapes[1], **settings})


def test_sizes_of_images_are_for_qwen(make, shapes, folder):
    model, processor = load_vision(folder, dtype="float32")
    before = dict(processor.image_processor.size)
    image = Image.new("RGB", (640, 640))
    tokens = prepare(processor, image, "?")["input_ids"].shape[1]
    make((model, processor), ratio=0.4, max_pixels=before["longest_edge"] // 4)
    assert prepare(processor, image, "?")["input_ids"].shape[1] < tokens
    assert processor.image_processor.size["shortest_edge"] == before["shortest_edge"]
    other = SimpleNamespace(image_processor=SimpleNamespace())
    with pytest.raises(pop_mm.ConfigError, match="Qwen-VL"):
        make((shapes[0], other), ratio=0.4, min_pixels=100)


def test_without_lmms_eval_the_error_says_what_to_install(monkeypatch):
    forget(monkeypatch)
    for name in [name for name in sys.modules if name.split(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(ImportError, match=r'pip install "pop_mm\[lmms-eval\]"') as caught:
        importlib.import_module("pop_mm.evaluation.lmms_harness")
    assert isinstance(caught.value, pop_mm.PopError)
    forget(monkeypatch)
    with pytest.raises(SystemExit, match=r'pip install "pop_mm\[lmms-eval\]"'):
        runpy.run_module("pop_mm.evaluation.lmms_harness", run_name="__main__")


def test_the_stand_in_evaluator_has_parameters_of_the_real_one(real):
    names = inspect.signature(inspect.unwrap(real.evaluate)).parameters
    assert set(inspect.signature(evaluate).parameters) <= set(names)
    assert list(names)[:2] == ["lm", "task_dict"]
