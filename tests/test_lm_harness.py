"""lm-evaluation-harness: how requests are scored, what a result says, tasks of our own, the command."""

import importlib
import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

import pop_mm
from helpers.modes import pruned
from helpers.observe import differences, fingerprint
from helpers.reference import Pop
from helpers.tiny_folder import save
from pop_mm import ConfigError, ExpertPolicy, PopConfig, PopError, prune
from pop_mm.evaluation import lm_harness
from pop_mm.evaluation.lm_harness import PopLM, tasks_folder
from pop_mm.samples import SampleError

CLOSE = 1e-9
END = 2  # </s>, the prefix token of the tiny tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def harness(model, tokenizer):
    """``harness(ratio=0.4)``: a PopLM around the tiny float64 llama; the ratio is that of each FFN."""

    def make(**settings):
        return PopLM(model, tokenizer=tokenizer, **{"ratio": 0.4, "scope": "ffn", "batch_size": 1, **settings})

    return make


def words(*numbers):
    return " ".join(f"w{n}" for n in numbers)


def requests(*pairs, kind="loglikelihood", task="some"):
    return [
        Instance(kind, {}, pair if isinstance(pair, tuple) else (pair,), i, (task, i, 1))
        for i, pair in enumerate(pairs)
    ]


def score(logits, targets):
    """Of logits [n, V] at n tokens: the sum of log-probabilities, and whether each is the most likely."""
    total = sum(float(row.log_softmax(-1)[target]) for row, target in zip(logits, targets, strict=True))
    return total, logits.argmax(-1).tolist() == list(targets)


@torch.no_grad()
def decoded(model, context, continuation, prefill="dense"):
    """A continuation scored by the reference: the context as prefill, then one step after the other."""
    with Pop(model, 0.4, prefill=prefill) as reference:
        logits = [reference.prefill(torch.tensor([context]))[0, -1:]]
        logits += [reference.step(torch.tensor([[token]]))[0] for token in continuation[:-1]]
    return score(torch.cat(logits), continuation)


@torch.no_grad()
def prefilled(model, context, continuation):
    """A continuation scored by the reference: everything is one partition prefill."""
    ids = torch.tensor([[*context, *continuation[:-1]]])
    with Pop(model, 0.4, prefill="partition") as reference:
        logits = reference.prefill(ids)[0, len(context) - 1 :]
    return score(logits, continuation)


def agree(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=CLOSE, rel=0)


PAIRS = [
    ([5, 9, 31, 7], [8, 40, 12]),
    ([33, 4], [50, 51, 52, 53, 54, 55]),
    ([60, 61, 62, 63, 64, 65, 66], [70, 71]),
    ([5, 9, 31, 7], [8]),
    ([21, 22, 23], [24, 25, 26, 27]),
]
ASKED = [(words(*context), " " + words(*continuation)) for context, continuation in PAIRS]


# settings ----------------------------------------------------------------------------------------------------------------


def test_the_model_is_registered():
    assert get_model("pop") is PopLM


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": 0.65, "loglikelihood": "prefill"}, "thresholds leave the prefill dense"),
        ({"budget": 0.65, "ratio": 0.2}, "Give one"),
        ({"settings": "nowhere.json"}, "nowhere.json cannot be read"),
        ({"ratio": 1.5}, "ratio must lie in"),
        ({"ratio": 0.2, "gama": 0.1}, "Did you mean 'gamma'"),
        ({"ratio": 0.2, "loglikelihood": "both"}, "'decode', 'prefill'"),
        ({"ratio": 0.2, "backend": "inplace"}, "batch='shared'"),
        ({"ratio": 0.2, "prefill": "partial"}, "prefill must be one of"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(monkeypatch, settings, says):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("was going to load a model"))
    with pytest.raises(ConfigError, match=says):
        PopLM("somewhere/model", **settings)


def test_a_mistyped_sample_is_refused():
    with pytest.raises(SampleError, match="did you mean smollm2-135m"):
        PopLM("smollm2-135", ratio=0.2)


def test_settings_go_where_they_belong(folder):
    arguments = (
        "ratio=0.3,gamma=0.2,scope=ffn,prefill=partition,prune_shared=false,backend=causal,dtype=float64,max_length=50"
    )
    lm = PopLM.create_from_arg_string(f"pretrained={folder},{arguments}", {"batch_size": 3, "device": None})
    found = lm.pop_config
    assert (found.ratio, found.scope, found.chosen) == (0.3, "ffn", pop_mm.Pop(gamma=0.2, prefill="partition"))
    assert (found.experts, found.batch, found.backend) == (ExpertPolicy(prune_shared=False), "per_sequence", "auto")
    assert (lm.max_length, lm.batch_size, lm.model.dtype) == (50, 3, torch.float64)


def test_a_shared_batch_can_be_asked_for(harness):
    assert harness(batch="shared", backend="masked").pop_config.batch == "shared"


# scoring -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("prefill", ["dense", "partition"])
def test_decode_scoring_equals_single_steps_however_batched(model, harness, rows, prefill):
    lm = harness(batch_size=rows, prefill=prefill)
    found = lm.loglikelihood(requests(*ASKED), disable_tqdm=True)
    agree(found, [decoded(model, *pair, prefill) for pair in PAIRS])
    tokens = sum(len(continuation) for _, continuation in PAIRS)
    tally = lm.tallies["some"]
    assert (tally.decode_requests, tally.prefill_requests, tally.scored_tokens) == (len(PAIRS), 0, tokens)
    assert tally.pruned_scored_tokens == tokens - (len(PAIRS) if prefill == "dense" else 0)


@pytest.mark.parametrize("rows", [1, 3])
def test_prefill_scoring_equals_one_partition_prefill(model, harness, rows):
    lm = harness(batch_size=rows, loglikelihood="prefill")
    agree(lm.loglikelihood(requests(*ASKED), disable_tqdm=True), [prefilled(model, *pair) for pair in PAIRS])
    info = lm.pop_info()
    assert (info["decode_requests"], info["prefill_requests"], info["pruned_token_share"]) == (0, len(PAIRS), 1.0)
    assert info["loglikelihood"] == "prefill"


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_is_scored_in_a_prefill(model, harness, context):
    lm = harness()
    found = lm.loglikelihood(requests((context, " " + words(8, 40, 12))), disable_tqdm=True)
    agree(found, [prefilled(model, [END], [8, 40, 12])])
    assert lm.tallies["some"].prefill_requests == 1


def test_rolling_windows_are_scored_in_a_prefill(model, harness):
    lm = harness(max_length=8, batch_size=2)
    tokens = list(range(10, 23))
    found = lm.loglikelihood_rolling(requests(words(*tokens), kind="loglikelihood_rolling"))
    windows = [([END], tokens[:8]), (tokens[4:8], tokens[8:])]  # the last window is filled up with context
    assert found == pytest.approx([sum(prefilled(model, *window)[0] for window in windows)], abs=CLOSE, rel=0)
    tally = lm.tallies["some"]
    assert (tally.decode_requests, tally.prefill_requests, tally.scored_tokens) == (0, 2, len(tokens))
    assert tally.pruned_token_share == 1.0


def test_long_contexts_are_cut_on_the_left(model, harness):
    lm = harness(max_length=6)
    found = lm.loglikelihood(requests((words(*range(10, 30)), " " + words(8, 40, 12))), disable_tqdm=True)
    agree(found, [decoded(model, list(range(26, 30)), [8, 40, 12])])


def test_a_continuation_that_does_not_fit_is_refused(harness):
    with pytest.raises(ValueError, match="1 to 6 tokens"):
        harness(max_length=6).loglikelihood(requests((words(5), " " + words(*range(10, 17)))), disable_tqdm=True)


def count_forwards(model, run):
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        return run(), shapes
    finally:
        hook.remove()


def test_thresholds_score_what_steps_after_each_prompt_give(model, tokenizer, tmp_path):
    PopConfig(budget=0.5).save(tmp_path / "settings.json")
    lm = PopLM(model, tokenizer=tokenizer, settings=tmp_path / "settings.json", batch_size=2)
    assert (lm.pop_config.chosen_method, lm.pop_config.budget) == ("thresholds", 0.5)

    def stepped(context, continuation):
        with torch.no_grad(), prune(model, budget=0.5):
            output = model(torch.tensor([context]), use_cache=True)
            logits, cache = [output.logits[0, -1:]], output.past_key_values
            for token in continuation[:-1]:
                logits.append(model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits[0])
        return score(torch.cat(logits), continuation)

    agree(lm.loglikelihood(requests(*ASKED), disable_tqdm=True), [stepped(*pair) for pair in PAIRS])
    tally = lm.tallies["some"]
    assert tally.prefill_requests == 2, "contexts of two and three tokens set no thresholds: all of them is dense"
    assert tally.pruned_scored_tokens == sum(len(steps) - 1 for context, steps in PAIRS if len(context) > 3)
    lm.loglikelihood_rolling(requests(words(*range(10, 23)), kind="loglikelihood_rolling", task="rolling"))
    assert lm.tallies["rolling"].pruned_token_share == 0
    (warning,) = [text for text in lm.pop_info()["warnings"] if text.startswith("rolling")]
    assert "nor texts without a context" in warning and "partition" not in warning


def test_answers_of_one_token_share_a_forward_and_warn(model, harness, caplog):
    lm = harness()
    choices = [(words(5, 9, 31), f" w{n}") for n in (8, 40, 12, 77)]
    with caplog.at_level(logging.WARNING):
        found, shapes = count_forwards(model, lambda: lm.loglikelihood(requests(*choices), disable_tqdm=True))
    agree(found, [decoded(model, [5, 9, 31], [n]) for n in (8, 40, 12, 77)])
    assert shapes == [(1, 3)]
    info = lm.pop_info()
    assert (info["scored_tokens"], info["pruned_token_share"]) == (4, 0.0)
    (warning,) = info["warnings"]
    assert "use prefill=partition" in warning and warning.startswith("some: only 0%") and warning in caplog.text
    lm = harness(prefill="partition")
    lm.loglikelihood(requests(*choices), disable_tqdm=True)
    assert lm.pop_info()["pruned_token_share"] == 1.0 and not lm.pop_info()["warnings"]


def test_the_same_tokens_with_another_context_are_scored_apart(model, harness):
    pairs = [([5, 9], [31, 7, 8]), ([5, 9, 31], [7, 8]), ([5, 9, 31, 7], [8]), ([5, 9], [31, 7, 40])]
    asked = [(words(*context), " " + words(*continuation)) for context, continuation in pairs]
    lm = harness(batch_size=4)
    found, shapes = count_forwards(model, lambda: lm.loglikelihood(requests(*asked), disable_tqdm=True))
    agree(found, [decoded(model, *pair) for pair in pairs])
    assert shapes == [(3, 4)]  # the first and the last differ in their last token alone


def test_dense_scores_are_those_of_hflm(model, tokenizer, harness):
    lm = harness(batch_size=3)
    with lm.dense():
        found = lm.loglikelihood(requests(*ASKED), disable_tqdm=True)
    expected = HFLM(model, tokenizer=tokenizer, batch_size=1).loglikelihood(requests(*ASKED), disable_tqdm=True)
    agree(found, expected)
    assert not lm.tallies


def test_automatic_batch_size(model, harness):
    lm = harness(batch_size="auto", max_batch_size=4)
    agree(lm.loglikelihood(requests(*ASKED), disable_tqdm=True), [decoded(model, *pair) for pair in PAIRS])


# generation --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_generation_is_that_of_generate_in_a_session(model, harness, tokenizer, rows):
    lm = harness(batch_size=rows)
    contexts = [[5, 9, 31, 7], [33, 4], [60, 61, 62, 63, 64, 65, 66]]
    asked = [(words(*context), {"until": ["w999"], "max_gen_toks": 6, "do_sample": False}) for context in contexts]
    found = lm.generate_until(requests(*asked, kind="generate_until"), disable_tqdm=True)
    for context, answer in zip(contexts, found, strict=True):
        with pruned(model, batch="per_sequence"):
            ids = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)
        assert answer == tokenizer.decode(ids[0, len(context) :], skip_special_tokens=True)
    info = lm.pop_info()
    assert info["generated_tokens"] == sum(len(answer.split()) for answer in found) > 6
    assert info["pruned_generated_tokens"] == info["generated_tokens"] - len(contexts)
    with lm.dense():
        assert lm.generate_until(requests(*asked, kind="generate_until"), disable_tqdm=True) != found


# results -----------------------------------------------------------------------------------------------------------------

TASK = """
task: {name}
custom_dataset: !function documents.load
output_type: {kind}
test_split: test
fewshot_split: examples
num_fewshot: 2
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """
doc_to_choice: choices
doc_to_target: 0
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
GENERATE = """
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w999"], max_gen_toks: 5, do_sample: SAMPLING}
metric_list:
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""
GROUP = """
group: both
task: [choose, again]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
"""
DOCUMENTS = """
import random
from datasets import Dataset

def load(**_):
    draw = random.Random(0)
    some = lambda n: " ".join(f"w{draw.randrange(3, 90)}" for _ in range(n))
    documents = [{"text": some(5), "choices": [some(3) for _ in range(3)]} for _ in range(20)]
    return {"examples": Dataset.from_list(documents[:8]), "test": Dataset.from_list(documents[8:])}
"""


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    home = tmp_path_factory.mktemp("tasks")
    choose = TASK.format(name="choose", kind="multiple_choice") + CHOICE
    (home / "documents.py").write_text(DOCUMENTS)
    (home / "choose.yaml").write_text(choose)
    (home / "again.yaml").write_text(choose.replace("choose", "again").replace("num_fewshot: 2", "num_fewshot: 1"))
    (home / "write.yaml").write_text(
        TASK.format(name="write", kind="generate_until") + GENERATE.replace("SAMPLING", "false")
    )
    (home / "draw.yaml").write_text(
        TASK.format(name="draw", kind="generate_until") + GENERATE.replace("SAMPLING", "true, temperature: 1.0")
    )
    (home / "both.yaml").write_text(GROUP)
    return TaskManager(include_path=str(home), include_defaults=False)


def evaluate(lm, manager, tasks, **settings):
    return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=10, **settings)


def metrics(results, name, dense):
    """Figures of a task or group, those of the dense model or the others, under their plain names."""
    found = results["results"][name].items()
    keys = {key.replace(" (dense)", ""): value for key, value in found if "," in key and (" (dense)" in key) == dense}
    return {key: value for key, value in keys.items() if not key.startswith("chrf_stderr")}  # bootstrapped


def test_results_carry_the_dense_model_of_the_same_run(model, tokenizer, harness, manager):
    before, lm = fingerprint(model), harness(batch_size=2)
    results = evaluate(lm, manager, ["both", "write"])
    dense = evaluate(HFLM(model, tokenizer=tokenizer, batch_size=1), manager, ["both", "write"])
    for name in ("choose", "again", "both", "write"):
        assert metrics(results, name, dense=True) == pytest.approx(metrics(dense, name, dense=False), abs=1e-9)
        assert metrics(results, name, dense=True).keys() == metrics(results, name, dense=False).keys()
    assert metrics(results, "choose", dense=True) != metrics(results, "choose", dense=False)
    assert metrics(results, "write", dense=True) != metrics(results, "write", dense=False)
    assert {"acc,none", "acc (dense),none", "acc_stderr,none", "acc (dense)_stderr,none"} <= results["groups"][
        "both"
    ].keys()
    assert results["higher_is_better"]["choose"]["brier_score (dense)"] is False
    assert not any("(dense)" in key for name in dense["results"] for key in dense["results"][name])
    samples = results["samples"]["choose"]
    (text, *_), first = samples[0]["arguments"][0], samples[0]["resps"][0][0]
    assert lm.loglikelihood(requests((text, samples[0]["arguments"][0][1])), disable_tqdm=True) == [first]
    assert not differences(before, fingerprint(model))


def test_results_say_what_was_done(harness, manager):
    lm = harness(batch_size=2)
    for _ in range(2):  # the counts are those of one run
        results = evaluate(lm, manager, ["choose", "write"], limit=4)
        info = results["config"]["pop"]
        assert info["config"] == lm.pop_config.to_dict() and info["loglikelihood"] == "decode"
        assert (info["decode_requests"], info["scored_tokens"]) == (12, 36)
        assert info["pruned_token_share"] == pytest.approx(2 / 3)
        assert info["tasks"]["choose"]["generated_tokens"] == info["tasks"]["write"]["scored_tokens"] == 0
        assert info["generated_tokens"] > 0 and not info["warnings"]
    json.dumps(results["config"]["pop"])


@pytest.mark.parametrize("task", ["choose", "draw"])
def test_a_ratio_of_zero_gives_the_dense_figures(harness, manager, task):
    lm = harness(ratio=0, batch_size=2)
    results = evaluate(lm, manager, [task])
    assert metrics(results, task, dense=True) == metrics(results, task, dense=False)
    assert lm.pop_info()["pruned_token_share"] in (0.0, None) and not lm.pop_info()["warnings"]


def test_a_cache_of_responses_is_refused(harness, manager, tmp_path):
    with pytest.raises(ValueError, match="--use_cache"):
        evaluate(harness(), manager, ["choose"], use_cache=str(tmp_path / "cache"))


# our own tasks and the command -------------------------------------------------------------------------------------------


def test_the_tasks_of_the_package_can_be_loaded():
    loaded = TaskManager(include_path=str(tasks_folder()), include_defaults=False).load(["pop_local"])["tasks"]
    counts = {name: len(task.eval_docs) for name, task in loaded.items()}
    assert counts == {"pop_arithmetic": 60, "pop_copy": 60, "pop_passages": 12, "pop_reading": 60, "pop_recall": 60}
    for name in ("pop_arithmetic", "pop_reading", "pop_recall"):
        labels = [document["label"] for document in loaded[name].eval_docs]
        assert {0, 1, 2, 3} == set(labels) and max(map(labels.count, range(4))) < 25
        assert all(len(set(document["choices"])) == 4 for document in loaded[name].eval_docs)


def test_the_files_of_the_tasks_are_what_their_script_makes():
    for name, text in runpy.run_path(str(tasks_folder() / "make.py"))["files"]().items():
        assert (tasks_folder() / name).read_text(encoding="utf-8") == text


def test_the_command_finds_our_tasks_and_shows_both_models(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **settings: TaskManager(include_defaults=False, **settings))
    arguments = ["--model_args", f"pretrained={folder},ratio=0.4,scope=ffn", "--output_path", str(tmp_path)]
    lm_harness.main(["run", "--model", "pop", *arguments, "--tasks", "pop_copy", "--limit", "2", "--device", "cpu"])
    table = capsys.readouterr().out
    assert "|exact_match (dense)|" in table and "|exact_match  " in table
    (file,) = Path(tmp_path).rglob("results_*.json")
    written = json.loads(file.read_text())
    assert {"exact_match,none", "exact_match (dense),none"} <= written["results"]["pop_copy"].keys()
    assert written["config"]["pop"]["config"]["ratio"] == 0.4


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        (["ls", "tasks"], True),
        (["run", "--include_path", "mine"], False),
        (["--tasks", "x", "--include_path=mine"], False),
    ],
)
def test_our_tasks_are_included_unless_others_are(monkeypatch, arguments, added):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.extend(sys.argv[1:]))
    lm_harness.main(arguments)
    assert seen == arguments + ["--include_path", str(tasks_folder())] * added
    assert sys.argv[0] != "lm_eval"


def test_without_lm_eval_the_message_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("lm_harness", "harness_model", "harness_results"):
        monkeypatch.delitem(sys.modules, f"pop_mm.evaluation.{name}")
    with pytest.raises(ImportError, match=r'pip install "pop_mm\[eval\]"') as caught:
        importlib.import_module("pop_mm.evaluation.lm_harness")
    assert isinstance(caught.value, PopError)
    with pytest.raises(SystemExit, match=r'pip install "pop_mm\[eval\]"'):
        runpy.run_module("pop_mm.evaluation.lm_harness", run_name="__main__")
