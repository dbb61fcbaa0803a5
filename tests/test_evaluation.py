"""``pop-mm eval`` and what is behind it: scores, methods, cost, intervals, texts, and runs that are interrupted."""

import io
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console

import pop_mm
from helpers.tiny_folder import save
from helpers.tiny_models import VOCAB
from pop_mm import ConfigError, ExpertPolicy, PopConfig
from pop_mm.evaluation import METHODS, calibrate, config_for, cost_of, dense_cost, first_differences, score_texts
from pop_mm.evaluation import run as module
from pop_mm.evaluation.fidelity import compare, greedy, pruned_step_logits
from pop_mm.evaluation.intervals import bootstrap, difference
from pop_mm.evaluation.run import EvaluationError, Point, Run, Setup, grid
from pop_mm.evaluation.show import markdown_table, print_table, title
from pop_mm.evaluation.texts import TextError, Window, pieces, read_dataset, read_files, windows

PREFILLS = ("dense", "partition")
SETUP = Setup("tiny", prompt=12, continuation=5, generate=4, scope="ffn", batch_size=2)


def texts(count=3, tokens=18, seed=0):
    ids = torch.randint(3, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(seed))
    return [Window(f"text {number}", row) for number, row in enumerate(ids)]


def stacked(windows):
    return torch.stack([window.ids for window in windows])


# scores -------------------------------------------------------------------------------------------------------------


def test_divergence_of_known_distributions():
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    score = compare(p.log(), q.log(), torch.tensor([0, 1]))
    assert score.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-6)
    assert score.loss == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2, abs=1e-6)
    assert score.agreement in (0.5, 1.0)  # the first row's argmax is a tie


def amount(method, ratio):
    """How much a method leaves out, as it takes it."""
    return {"budget": 1 - ratio} if method == "thresholds" else {"ratio": ratio}


@pytest.mark.parametrize(
    ("method", "prefill"), [(m, p) for m in METHODS for p in PREFILLS if (m, p) != ("thresholds", PREFILLS[1])]
)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_ratio_0_is_the_dense_model(load, method, prefill, model_type):
    model, ids = load(model_type), stacked(texts())
    config = config_for(method, **amount(method, 0.0), prefill=prefill, calibration=calibrate(model, [ids[:1]]))
    for dense, score in zip(score_texts(model, ids, 12, None), score_texts(model, ids, 12, config), strict=True):
        assert score == dense and (score.kl, score.agreement) == (0, 1)
    assert first_differences(model, ids, 12, config, 5) == [5, 5, 5]


def test_texts_of_a_batch_do_not_matter_to_each_other(model):
    ids = stacked(texts())
    for method in ("pop", "static", "griffin"):
        config = config_for(method, 0.4, scope="ffn")
        together = score_texts(model, ids, 12, config)
        alone = [score_texts(model, row.unsqueeze(0), 12, config)[0] for row in ids]
        for a, b in zip(together, alone, strict=True):
            assert (a.loss, a.kl, a.agreement) == pytest.approx((b.loss, b.kl, b.agreement), abs=1e-9)
    shared = score_texts(model, ids, 12, config_for("static", 0.4, scope="ffn", batch="shared"))
    assert shared[0].kl != pytest.approx(together[0].kl)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "qwen2_moe"])
@torch.no_grad()
def test_one_forward_scores_the_steps_of_thresholds(load, model_type):
    model, ids = load(model_type, torch.float64), stacked(texts())
    config = config_for("thresholds", budget=0.6)
    whole, session = pruned_step_logits(model, ids, 12, config)
    with pop_mm.prune(model, config) as single:
        cache = model(ids[:, :12], use_cache=True).past_key_values
        steps = [model(column, past_key_values=cache).logits for column in ids[:, 12:-1].split(1, 1)]
    torch.testing.assert_close(whole, torch.cat(steps, 1), rtol=0, atol=1e-12)
    assert [i.thresholds for i in session.report.inputs] == [i.thresholds for i in single.report.inputs]
    assert [i.kept for i in session.report.inputs] == [i.kept for i in single.report.inputs]
    assert session.report.timings.decode_forwards <= 1 < single.report.timings.decode_forwards


def test_first_difference_is_counted_from_the_prompt(model):
    ids, config = stacked(texts()), config_for("random", 0.6, scope="ffn")
    dense = greedy(model, ids, 12, 6)
    with pop_mm.prune(model, config):
        pruned = greedy(model, ids, 12, 6)
    expected = [next((i for i, same in enumerate(row) if not same), 6) for row in (dense == pruned).tolist()]
    assert first_differences(model, ids, 12, config, 6) == expected
    assert min(expected) < 6


def test_methods_choose_different_channels(load):
    model, ids = load(), stacked(texts())
    calibration = calibrate(model, [window.ids.unsqueeze(0) for window in texts(seed=1)])
    kl = {
        name: [
            score.kl
            for score in score_texts(
                model, ids, 12, config_for(name, **amount(name, 0.4), scope="ffn", calibration=calibration)
            )
        ]
        for name in METHODS
    }
    assert len({tuple(values) for values in kl.values()}) == len(METHODS)
    seeds = [config_for("random", 0.4, scope="ffn", seed=seed) for seed in (0, 0, 1)]
    first, same, other = (score_texts(model, ids, 12, config) for config in seeds)
    assert first == same != other


def test_calibration_adds_texts_up(model):
    rows = [window.ids.unsqueeze(0) for window in texts()]
    together, alone = calibrate(model, rows).energies, [calibrate(model, [row]).energies for row in rows]
    for name, energy in together.items():
        torch.testing.assert_close(energy, sum(part[name] for part in alone))


def test_calibration_that_does_not_reach_all(load):
    model = load("mixtral")
    calibration = calibrate(model, [texts(1)[0].ids[:1].unsqueeze(0)])  # one token: two experts of each layer
    energy = next(iter(calibration.energies.values()))
    missed = energy.sum(-1) == 0
    assert 0 < missed.sum() < len(missed)
    calibration.energies.pop(next(reversed(calibration.energies)))  # and a layer that did not run at all
    with pop_mm.prune(model, config_for("wanda_sp", 0.4, scope="ffn", calibration=calibration)) as session:
        greedy(model, stacked(texts(1)), 12, 2)
        first, *_, last = session.report.ffns
    for ffn, units in ((first, missed), (last, torch.ones_like(missed))):
        record = ffn.plan.ffn
        by_weights = (record.down_column_norms() * record.input_norms())[units]
        pruned = by_weights.argsort(dim=-1, descending=True, stable=True)[:, ffn.plan.sizes.width :].sort(-1).values
        assert torch.equal(ffn.partition.pruned[units], pruned)


def test_wrong_methods():
    with pytest.raises(ConfigError, match="Unknown method 'wanda'; known: dense, static"):
        config_for("wanda", 0.2)
    with pytest.raises(ConfigError, match="wanda_sp ranks channels by calibration text"):
        config_for("wanda_sp", 0.2)
    with pytest.raises(EvaluationError, match="Unknown method 'best'"):
        grid(["pop", "best"], [0.2], [0.1], ["dense"])


# cost ---------------------------------------------------------------------------------------------------------------


def test_cost_of_a_dense_ffn(load):
    model = load(tie_word_embeddings=False)
    whole = dense_cost(model)
    read = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    assert sum(whole.multiply_adds.values()) == sum(p.numel() for p in read)
    assert sum(whole.bytes.values()) == sum(p.nbytes for p in read)
    sizes = {}
    for method, gamma in (("static", 0.1), ("pop", 0.2), ("full", 0.1)):
        config = config_for(method, 0.4, gamma, scope="ffn")
        with pop_mm.prune(model, config) as session:
            greedy(model, stacked(texts(1)), 12, 3)
            cost, plan = cost_of(model, config, session.report), session.plans[0]
        sizes[method] = plan.sizes
        share = {"static": plan.sizes.kept, "pop": plan.sizes.width, "full": plan.sizes.channels}[
            method
        ] / plan.ffn.size
        assert cost.multiply_adds["FFN"] == round(share * whole.multiply_adds["FFN"])
        assert cost.multiply_adds.get("scoring", 0) == len(session.plans) * plan.sizes.candidates
        assert cost.multiply_adds["attention"] == whole.multiply_adds["attention"]
    assert sizes["static"].width < sizes["pop"].width < sizes["full"].width


def test_cost_of_experts_counts_those_that_ran_dense(load):
    model = load("mixtral")
    ids = stacked(texts(1))
    config = PopConfig(0.4, scope="ffn", backend="masked", experts=ExpertPolicy(min_tokens=10**6))
    with pop_mm.prune(model, config) as session:
        greedy(model, ids, 12, 4)
        waiting = cost_of(model, config, session.report)
    whole = dense_cost(model)
    assert waiting.multiply_adds["routed experts"] == whole.multiply_adds["routed experts"]
    config = replace(config, experts=ExpertPolicy(unseen="weights"))
    with pop_mm.prune(model, config) as session:
        greedy(model, ids, 12, 4)
        partitioned = cost_of(model, config, session.report)
    sizes = session.plans[0].sizes
    assert partitioned.multiply_adds["routed experts"] == round(
        whole.multiply_adds["routed experts"] * sizes.width / sizes.channels
    )


# figures ------------------------------------------------------------------------------------------------------------


def test_paired_bootstrap():
    values = [1.0, 2.0, 3.0, 6.0]
    mean = bootstrap(values)
    assert mean.value == 3
    assert 1 <= mean.low < 3 < mean.high <= 6
    half = bootstrap([value / 2 for value in values], values)  # paired: the quotient is 1/2 in every resample
    assert (half.value, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    apart = difference([value + 1 for value in values], values)
    assert (apart.value, apart.low, apart.high) == pytest.approx((1, 1, 1))


def test_grid_has_no_point_twice():
    points = grid(["pop", "static", "full", "dense"], [0.2, 0.4], [0.1, 0.2], PREFILLS)
    assert len(points) == len(set(points)) == 1 + 2 * (2 * 3) + 2
    assert points[0] == Point("dense")
    assert [p.prefill for p in points if p.method == "full"] == ["dense"] * 2


# runs ---------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_gives_the_same(model, tmp_path):
    points = grid(["pop", "static"], [0.2, 0.4], [0.1], ["dense"])
    whole = Run(model, SETUP, texts())
    whole.work(points)
    done = 0

    def interrupt():
        nonlocal done
        done += 1
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(model, SETUP, texts(), folder=tmp_path).work(points, interrupt)
    with (tmp_path / module.UNITS).open("a") as file:
        file.write('{"point": {"method": "po')  # cut off while it was written
    again = Run(model, SETUP, texts(), folder=tmp_path)
    assert len(again._units) == 6
    again.work(points)
    assert json.dumps(again.results(points)) == json.dumps(whole.results(points))
    more = Run(model, SETUP, texts(), folder=tmp_path)
    more.work([*points, Point("full", 0.4)])  # the grid may grow
    assert more.results(points) == whole.results(points)


def test_a_record_that_was_cut_anywhere_goes_on(model, tmp_path):
    setup = replace(SETUP, settings={"layer_ratios": {0: 0.0}})
    points = grid(["static"], [0.4], [0.1], ["dense"])
    whole = Run(model, setup, texts(), folder=tmp_path / "whole")
    whole.work(points)
    record = (tmp_path / "whole" / module.UNITS).read_bytes()
    first = record.index(b"\n")
    for cut in (0, 5, first, first + 1, first + 20, len(record) - 1):
        (tmp_path / f"{cut}").mkdir()
        (tmp_path / f"{cut}" / module.UNITS).write_bytes(record[:cut])
        again = Run(model, setup, texts(), folder=tmp_path / f"{cut}")
        again.work(points)
        assert again.results(points) == whole.results(points)
        assert len(Run(model, setup, texts(), folder=tmp_path / f"{cut}")._units) == whole.total(points)
    with (tmp_path / "whole" / module.UNITS).open("ab") as file:
        file.write(b"123\n\xff\n{}\n")
    assert len(Run(model, setup, texts(), folder=tmp_path / "whole")._units) == whole.total(points)


def test_one_text_has_no_interval(model):
    points = grid(["static", "pop"], [0.4], [0.1, 0.2, 1.0], ["dense"])
    run = Run(model, SETUP, texts(1))
    run.work(points)
    results = run.results(points)
    for row in results["rows"]:
        assert row["kl_interval"] is row["perplexity_interval"] is None
    assert results["rows"][-1]["kl_minus_static"][1:] == [None, None]
    assert 0.18 < results["rows"][-2]["candidates"] < 0.22 < results["rows"][-1]["candidates"] < 1
    assert "[" not in markdown_table(results)
    assert "1 (0.78)" in markdown_table(results)  # gamma that does not fit the ratio
    assert "1 piece of text" in title(results["setup"]) and title(results["setup"]).endswith("shares are of FFNs")


@pytest.mark.parametrize(("width", "terminal"), [(80, False), (110, True), (250, True)])
def test_the_table_is_never_cut(model, width, terminal):
    points = grid(["static", "pop"], [0.4], [0.1], ["dense"])
    run = Run(model, replace(SETUP, model="m[bold]od"), texts())
    run.work(points)
    out = io.StringIO()
    print_table(Console(file=out, width=width, force_terminal=terminal, color_system=None), run.results(points))
    text = out.getvalue()
    assert "\u2026" not in text and "m[bold]od" in text and "static" in text
    assert ("95 %" in text) == (width != 110)


def test_another_setup_is_refused(model, load, tmp_path):
    Run(model, SETUP, texts(), folder=tmp_path)
    for setup, given, other, what in (
        (replace(SETUP, seed=1), texts(), model, "seed differ"),
        (SETUP, texts(seed=1), model, "texts differ"),
        (SETUP, texts(), load("qwen2"), "model_class, .*weights differ"),
    ):
        with pytest.raises(EvaluationError, match=what):
            Run(other, setup, given, folder=tmp_path)
    (tmp_path / module.UNITS).write_text("something else\n")
    with pytest.raises(EvaluationError, match="not the record of an evaluation"):
        Run(model, SETUP, texts(), folder=tmp_path)


def test_rows(model):
    points = grid([*METHODS], [0.4], [0.1, 0.2], PREFILLS, [0.6])
    run = Run(model, SETUP, texts(), texts(seed=3))
    advanced = []
    run.work(points, lambda: advanced.append(1))
    assert len(advanced) == run.total(points) == 2 * len(points)
    dense, *rows = run.results(points)["rows"]
    assert (dense["kl"], dense["agreement"], dense["cost"]["bytes_share"]) == (0, 1, 1)
    for point, row in zip(points[1:], rows, strict=True):
        assert {key: row[key] for key in vars(point)} == vars(point)
        assert row["kl_interval"][0] <= row["kl"] <= row["kl_interval"][1]
        assert row["kl"] == pytest.approx(sum(run.values(point, "kl")) / 3)
        assert row["perplexity"] == pytest.approx(math.exp(sum(run.values(point, "loss")) / 3))
        assert ("kl_minus_static" in row) == (point.method != "static")
        sizes = row["cost"]["bytes"]
        assert row["bytes_read"] == sum(sizes.values()) - sizes.get("scoring", 0)  # as every report
        assert (row["budget"] is None) != (row["ratio"] is None)
        assert 0 <= row["same_tokens"] <= SETUP.generate
    assert {(row["method"], row["budget"]) for row in rows} >= {("thresholds", 0.6), ("pop", 0.6), ("static", 0.6)}


# texts --------------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer of whole words, each a number."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}


def test_windows_take_all_texts_in_turn():
    found = {"a": " ".join(map(str, range(11))), "b": "100 101 102 103 104"}
    cut = windows(found, Words(), 4)
    assert [(w.name, w.ids.tolist()) for w in cut] == [
        ("a", [0, 1, 2, 3]),
        ("b", [100, 101, 102, 103]),
        ("a #2", [4, 5, 6, 7]),
    ]
    assert [w.name for w in windows(found, Words(), 4, 2)] == ["a", "b"]
    rest = {w.name: w.ids.tolist() for w in pieces(found, Words(), 4) if len(w.ids) < 4}
    assert rest == {"a #3": [8, 9, 10]}  # and none of "b", whose rest is one token
    with pytest.raises(TextError, match=r"No text has the 12 tokens .*longest has 11"):
        windows(found, Words(), 12)


class Framed(Words):
    """The same, with a token before and after each text."""

    def __call__(self, text, add_special_tokens=True, **_):
        ids = super().__call__(text)["input_ids"]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def test_every_window_begins_as_a_text_does():
    cut = windows({"a": " ".join(map(str, range(10, 18)))}, Framed(), 4)
    assert [w.ids.tolist() for w in cut] == [[1, 10, 11, 12], [1, 13, 14, 15]]
    assert pieces({"a": "10 11 12 13 14"}, Framed(), 4)[-1].ids.tolist() == [1, 13, 14]
    with pytest.raises(TextError, match="no room for text"):
        windows({"a": "10 11"}, Framed(), 1)


def test_files_of_one_name(tmp_path):
    for folder, text in (("x", "one"), ("y", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"\ufeff{text}", encoding="utf-8")
    both = [str(tmp_path / folder / "a.txt") for folder in ("x", "y", "x")]
    assert read_files(both) == {"a.txt": "one", "a.txt (2)": "two"}


def test_files_and_data_sets(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n" for t in ("one", "", "two")))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert read_files([str(tmp_path / "a.txt")]) == {"a.txt": "one"}
    for name, what in (("empty.txt", "is empty"), ("latin.txt", "no UTF-8"), ("none.txt", "No such file")):
        with pytest.raises(TextError, match=what):
            read_files([str(tmp_path / name)])
    pytest.importorskip("datasets")
    rows = str(tmp_path / "rows.jsonl")
    assert read_dataset(rows, "test", "text") == {f"{rows}:test": "one\n\ntwo"}
    with pytest.raises(TextError, match="no column 'body'; it has text, n"):
        read_dataset(rows, "test", "body")
    with pytest.raises(TextError, match="holds no text"):
        read_dataset(rows, "test", "n")


# command ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=2)


@pytest.fixture
def prose(tmp_path):
    ids = torch.randint(3, VOCAB, (60,), generator=torch.Generator().manual_seed(5)).tolist()
    (tmp_path / "prose.txt").write_text(" ".join(f"w{i}" for i in ids))
    return tmp_path / "prose.txt"


SMALL = ("--prompt", 12, "--continuation", 5, "--generate", 4, "--scope", "ffn")


def test_command(call, folder, prose, tmp_path):
    asked = ("eval", "--model", folder, "--text", prose, *SMALL, "--ratio", 0.4, "--gamma", 0.1, "--gamma", 0.2)
    code, out, err = call(*asked, "--output", tmp_path / "out", "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    results = json.loads((tmp_path / "out.json").read_text())
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["method"], row["gamma"]) for row in results["rows"]] == [
        ("dense", None),
        ("static", None),
        ("pop", 0.1),
        ("pop", 0.2),
        ("full", None),
    ]
    assert len(results["setup"]["texts"]) == 3
    assert {"model", "method", "ratio", "gamma", "prefill", "perplexity", "kl", "agreement", "cost"} < set(
        results["rows"][1]
    )
    page = (tmp_path / "out" / "results.md").read_text()
    assert all(f"| {row['method']} |" in page for row in results["rows"])
    assert all(version in page for version in results["setup"]["versions"].values())
    assert "pop" in out and "3 pieces of text" in " ".join(out.split())
    with Image.open(tmp_path / "out" / "quality.png") as saved:
        assert min(saved.size) > 400
    first = (tmp_path / "out" / "results.json").read_bytes()
    assert call(*asked, "--output", tmp_path / "out")[0] == 0  # everything is there already
    assert call(*asked, "--output", tmp_path / "anew")[0] == 0
    assert (
        first == (tmp_path / "out" / "results.json").read_bytes() == (tmp_path / "anew" / "results.json").read_bytes()
    )


def test_command_with_calibration_and_shared_batches(call, folder, prose, tmp_path):
    code, out, _ = call(
        *("eval", "--model", folder, "--text", prose, *SMALL, "--ratio", 0.4, "--method", "wanda_sp", "--json", "-"),
        *("--calibration", prose, "--batch", "shared", "--batch-size", 3, "--prefill", "partition"),
    )
    assert code == 0
    results = json.loads(out)
    assert list(results["setup"]["calibration"]) == ["prose.txt", "prose.txt #2", "prose.txt #3", "prose.txt #4"]
    assert results["setup"]["calibration_tokens"] == 60
    assert [row["method"] for row in results["rows"]] == ["dense", "wanda_sp"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "best"), "Unknown method 'best'"),
        (("--ratio", 1.2), r"ratio must lie in \[0, 1\)"),
        (("--ratio", 1 - 1e-9), "leaves none of an FFN"),
        (("--prefill", "sparse"), "prefill must be one of"),
        (("--batch", "alone"), "batch must be one of"),
        (("--prompt", 500), "context of|tokens that prompt and continuation need"),
        (("--method", "wanda_sp"), "--calibration FILE"),
        (("--dataset", "x"), "--text or --dataset, not both"),
        (("--text", "none.txt"), "cannot be read"),
        (("--output", __file__), "must be a folder"),
        (("--output", ""), "--output is empty"),
    ],
)
def test_command_says_what_is_wrong(call, folder, prose, options, message):
    code, out, err = call("eval", "--model", folder, "--text", prose, *SMALL, *options)
    assert (code, out) == (2, "")
    assert re.search(message, err), err
