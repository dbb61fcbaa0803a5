"""The compiled kernels: right for every shape, taken only where it may be, and missed by nobody."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pop_mm.kernels as kernels
from helpers.modes import generate, left_padded, pruned, threads_of_torch
from helpers.observe import prompt
from helpers.tiny_models import tiny
from pop_mm import ConfigError, PopConfig, prune
from pop_mm.kernels import MOST_TOKENS, Matvec, Rows
from pop_mm.kernels.activations import ACTIVATIONS
from pop_mm.kernels.ffn import FFNStep, Scratch
from pop_mm.ops.select import lowest, shared_scores
from pop_mm.partition import Sizes
from pop_mm.weights.layout import FFN, Projection

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """How often the kernels ran: one entry a call, the number of its matrices, or "ffn"."""
    found = []
    original = Matvec.__call__

    def call(self, rows, x):
        found.append(sum(r.count for r in rows))
        return original(self, rows, x)

    def ffn(self, *args):
        found.append("ffn")
        return original_ffn(self, *args)

    original_ffn = FFNStep.__call__
    monkeypatch.setattr(Matvec, "__call__", call)
    monkeypatch.setattr(FFNStep, "__call__", ffn)
    return found


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    matrices=st.integers(1, 4),
    rows=st.integers(1, 21),
    columns=st.integers(1, 90),
    gap=st.integers(0, 9),
    shared=st.booleans(),
    threads=st.integers(1, 5),
)
def test_products_are_those_of_float64(dtype, matrices, rows, columns, gap, shared, threads):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    wide = torch.randn(matrices, rows, columns + gap, generator=generator).to(dtype)
    x = torch.randn(1 if shared else matrices, columns, generator=generator).to(dtype)
    narrow = [matrix[:, :columns] for matrix in wide]
    with threads_of_torch(threads):
        found = kernels.load("compiled")([Rows(narrow[:1]), *([Rows(narrow[1:])] if matrices > 1 else [])], x)
    expected = torch.stack([m.double() @ v.double() for m, v in zip(narrow, x.expand(matrices, -1), strict=True)])
    assert found.dtype == dtype
    scale = torch.stack(
        [m.double().abs() @ v.double().abs() for m, v in zip(narrow, x.expand(matrices, -1), strict=True)]
    )
    assert bool(((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * scale + 1e-30).all())


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, MOST_TOKENS),
    rows=st.integers(1, 21),
    columns=st.integers(1, 90),
    gap=st.integers(0, 9),
    bias=st.booleans(),
    threads=st.integers(1, 3),
)
def test_products_of_several_tokens_are_those_of_float64(dtype, tokens, rows, columns, gap, bias, threads):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    matrix = torch.randn(rows, columns + gap, generator=generator).to(dtype)[:, :columns]
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    added = torch.randn(rows, generator=generator).to(dtype) if bias else None
    with threads_of_torch(threads):
        found = kernels.load("compiled")([Rows([matrix], [added])], x)
    expected, scale = x.double() @ matrix.double().t(), x.double().abs() @ matrix.double().abs().t()
    if bias:
        expected, scale = expected + added.double(), scale + added.double().abs()
    assert found.dtype == dtype and found.shape == (tokens, rows)
    assert bool(((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * scale + 1e-30).all())


def an_ffn(activation, hidden, size, dtype, gated=True, bias=False, seed=0):
    """Random weights: gate and up fused in one module, or up alone."""
    generator = torch.Generator().manual_seed(seed)
    up, down = torch.nn.Linear(hidden, size * (1 + gated), bias), torch.nn.Linear(size, hidden, bias)
    act = torch.nn.Module()
    act.forward = ACTIVATIONS[activation]
    for p in (*up.parameters(), *down.parameters()):
        p.data = torch.randn(p.shape, generator=generator).div_(p.shape[-1] ** 0.5)
    inputs = Projection("up", up.to(dtype), "out", 1 + gated)
    return FFN("ffn", 0, (inputs,), Projection("down", down.to(dtype), "in"), size, activation=act)


def step_of(ffn, sizes):
    return FFNStep(kernels.load("compiled"), ffn, sizes, Scratch())


def by_torch(ffn, sizes, x, weight, valid=None):
    """The candidates' scores, what the choice leaves out, and the output."""
    views = [view for p in ffn.inputs for view in p.narrow_views(sizes.width)]
    parts = [x @ w if b is None else x @ w + b for w, b in views]
    h = ffn.activation.forward(parts[0])
    h = h * parts[1] if len(parts) == 2 else h
    together = torch.zeros(len(h), dtype=torch.int64)
    scores = shared_scores(h[:, sizes.retained :].float(), weight, together, 1, valid if len(h) > 1 else None)[0]
    dropped = lowest(scores, sizes.candidates_dropped)
    kept = h.clone()
    kept[:, sizes.retained :].scatter_(1, dropped.expand(len(h), -1), 0)
    w, b = ffn.down.narrow_views(sizes.width)[0]
    return scores.double(), dropped, kept @ w if b is None else kept @ w + b


@settings(max_examples=80, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    hidden=st.integers(1, 70),
    retained=st.integers(0, 40),
    candidates=st.integers(0, 30),
    pruned=st.integers(0, 20),
    share=st.floats(0, 1),
    gated=st.booleans(),
    bias=st.booleans(),
    tokens=st.integers(1, 6),
    threads=st.integers(1, 3),
)
def test_a_whole_ffn_is_that_of_torch(
    dtype, activation, hidden, retained, candidates, pruned, share, gated, bias, tokens, threads
):
    sizes = Sizes(max(retained + candidates + pruned, 1), retained, candidates, int(share * candidates))
    if not sizes.width:
        return
    ffn = an_ffn(activation, hidden, sizes.channels, dtype, gated, bias, seed=hidden)
    assert FFNStep.fits(ffn)
    generator = torch.Generator().manual_seed(retained)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    valid = torch.rand(tokens, generator=generator) < 0.8 if tokens > 1 and bias else None
    weight = torch.rand(candidates, generator=torch.Generator().manual_seed(candidates))
    dropped = torch.empty(1, sizes.candidates_dropped, dtype=torch.int64)
    with threads_of_torch(threads):
        found = step_of(ffn, sizes)(x, weight, valid, dropped.data_ptr())
    scores, expected_dropped, expected = by_torch(ffn, sizes, x, weight, valid)
    assert dropped.unique().numel() == dropped.numel()
    close = 0.05 if dtype == torch.bfloat16 else 1e-4
    # no candidate that was left out scores above one that was kept, up to rounding
    left_out = torch.zeros(candidates, dtype=torch.bool).scatter_(0, dropped[0], True)
    if left_out.any() and not left_out.all():
        assert scores[left_out].max() <= scores[~left_out].min() + close * scores.max()
    if torch.equal(dropped[0].sort().values, expected_dropped.flatten().sort().values):
        torch.testing.assert_close(found, expected, rtol=0, atol=close * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_exact(seed):
    """Gates of 1 and an identity in front: the scores are the inputs, ties and what is not finite included."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(2, 300, (1,), generator=generator))
    sizes = Sizes(count, 0, count, int(torch.randint(0, count + 1, (1,), generator=generator)))
    ffn = an_ffn("relu", count, count, torch.float32, gated=False)
    ffn.inputs[0].weight.data = torch.eye(count)
    ffn.down.weight.data = torch.eye(count)
    x = torch.randint(1, 40 if seed % 2 else 3, (1, count), generator=generator).float()
    dropped = torch.empty(1, sizes.candidates_dropped, dtype=torch.int64)
    found = step_of(ffn, sizes)(x, torch.ones(count), None, dropped.data_ptr())
    by_score = sorted(range(count), key=lambda i: (float(x[0, i]), -i))  # of equal scores, the later go
    assert sorted(dropped[0].tolist()) == sorted(by_score[: sizes.candidates_dropped])
    assert torch.equal(found, x.scatter(1, dropped, 0))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_candidate_that_is_not_finite_goes_first(bad):
    sizes = Sizes(4, 1, 3, 2)
    ffn = an_ffn("relu", 4, 4, torch.float32, gated=False)
    ffn.inputs[0].weight.data = torch.eye(4)
    weight = torch.tensor([1.0, bad, 1.0])
    dropped = torch.empty(1, 1, dtype=torch.int64)
    step_of(ffn, sizes)(torch.ones(1, 4), weight, None, dropped.data_ptr())
    assert dropped.tolist() == [[1]]


def test_an_activation_that_the_kernel_does_not_know():
    ffn = an_ffn("silu", 8, 8, torch.float32)
    ffn.activation.forward = torch.sigmoid
    assert not FFNStep.fits(ffn)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype):
    weight = torch.ones(6, 40, dtype=dtype)
    weight[1, 3], weight[2, 39], weight[3, 0] = float("nan"), float("inf"), float("-inf")
    found = kernels.load("compiled")([Rows([weight])], torch.ones(1, 40, dtype=dtype))[0]
    assert found.isnan().tolist() == [False, True, False, False, False, False]
    assert found[2] == float("inf") and found[3] == float("-inf") and found[0] == 40


def test_what_the_kernel_cannot_read():
    plain = torch.zeros(4, 8)
    assert Rows.fit([plain, plain[:, :3], plain[::2]])
    assert Rows.fit([plain.bfloat16()])
    assert not Rows.fit([plain, plain.bfloat16()])
    assert not Rows.fit([plain, plain.t()])
    assert not Rows.fit([plain.double()])
    assert not Rows.fit([plain.half()])
    assert not Rows.fit([plain.to("meta")])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "model_type", ["llama", "phi3", "gpt_neox", "mixtral", "qwen2_moe", "nemotron_h", "deepseek_v3"]
)
def test_decoding_is_that_of_torchs_kernels(model_type, dtype, calls):
    model = tiny(model_type, dtype)
    runs = {}
    for name in ("stock", "compiled"):
        with pruned(model, "inplace", kernels=name) as session:
            runs[name] = generate(model, prompt(), 8, do_sample=False)
        report = session.report.to_dict()
        assert report["kernels"] == name
        runs[name] += ([ffn["active_per_step"] for ffn in report["ffns"]],)
        assert bool(calls) == (name == "compiled")
    (_, stock, stock_active), (_, found, active) = runs["stock"], runs["compiled"]
    assert active == stock_active
    # the first pruned step starts from the same dense prefill; in bfloat16 a later one may choose other channels
    steps = 2 if dtype == torch.bfloat16 else len(stock)
    close = 0.1 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(found[:steps], stock[:steps], rtol=0, atol=close * float(stock.abs().max()))


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "opt"])
def test_layouts_that_the_kernel_does_not_take_decode_by_torchs(model_type):
    model = tiny(model_type, torch.float32)
    with pruned(model, "inplace", kernels="stock"):
        expected = generate(model, prompt(), 5)
    with pruned(model, "inplace", kernels="compiled"):
        found = generate(model, prompt(), 5)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-4)


def _cached(model):
    with torch.no_grad():
        return model(prompt(), use_cache=True).past_key_values


def test_one_token_without_autograd_takes_it(calls):
    model = tiny("llama", torch.float32)
    with pruned(model, "inplace", kernels="compiled"):
        cache = _cached(model)
        assert not calls  # prefill
        with torch.no_grad():
            model(prompt(length=1), past_key_values=cache)
        assert calls == [*[1, 1, 1, 1, "ffn"] * model.config.num_hidden_layers, 1]  # attention, FFN; lm_head


@pytest.mark.parametrize("case", ["autograd", "autocast", "two tokens", "many rows", "float64", "stock", "masked"])
def test_nothing_else_does(case, calls):
    model = tiny("llama", torch.float64 if case == "float64" else torch.float32)
    backend = "masked" if case == "masked" else "inplace"
    with pruned(model, backend, kernels="stock" if case == "stock" else "auto") as session:
        if case == "many rows":
            generate(model, prompt(MOST_TOKENS + 1), 3)
        elif case == "two tokens":
            with session.split(4), torch.no_grad():
                model(prompt())
        else:
            cache = _cached(model)
            with torch.set_grad_enabled(case == "autograd"), torch.autocast("cpu", enabled=case == "autocast"):
                logits = model(prompt(length=1), past_key_values=cache).logits
            assert logits.requires_grad == (case == "autograd")
    assert not calls


def batch_of_steps(model, rows, name):
    """Logits of three steps of a batch, and the report; the first row is padded, the second has ended after its first step."""
    ids, mask = left_padded(prompt(rows), (3,))
    with pruned(model, "inplace", kernels=name) as session, torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        logits = []
        for step in range(3):
            mask = torch.cat([mask, torch.ones(rows, 1, dtype=mask.dtype)], 1)
            here = mask.clone()
            here[1, -1] = step < 1
            logits.append(model(prompt(rows, 1, step), past_key_values=cache, attention_mask=here).logits.double())
    going = [row for row in range(rows) if row != 1]
    return torch.cat(logits, 1)[going], session.report.to_dict()


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("rows", [2, 5, MOST_TOKENS])
def test_a_batch_decodes_as_by_torchs_kernels(model_type, rows, calls):
    model = tiny(model_type, torch.float32)
    stock, stock_report = batch_of_steps(model, rows, "stock")
    assert not calls
    found, report = batch_of_steps(model, rows, "compiled")
    assert "ffn" in calls and calls.count(1) >= 3
    for name in "active_per_step", "candidate_stability":
        assert [ffn[name] for ffn in report["ffns"]] == [ffn[name] for ffn in stock_report["ffns"]]
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-4 * float(stock.abs().max()))


def test_a_batch_in_bfloat16_is_as_near_to_float32_as_by_torchs_kernels(calls):
    model, rows = tiny("llama", torch.float32), 7
    exact = batch_of_steps(model, rows, "stock")[0]
    stock, found = (batch_of_steps(model.to(torch.bfloat16), rows, name)[0] for name in ("stock", "compiled"))
    assert "ffn" in calls
    assert (found - exact).abs().mean() <= 1.5 * (stock - exact).abs().mean()


def test_weights_that_are_replaced_are_used(calls):
    model = tiny("llama", torch.float32)
    other = tiny("llama", torch.float32)
    with torch.no_grad():
        for p in other.model.layers[0].mlp.parameters():
            p.mul_(1.5)
    with pruned(other, "inplace", kernels="stock"):
        expected = generate(other, prompt(), 4)[1]
    with pruned(model, "inplace", kernels="compiled"):
        generate(model, prompt(), 3)
        for name in ("gate_proj", "up_proj", "down_proj"):
            weights = getattr(other.model.layers[0].mlp, name).state_dict()  # copied: what two models share runs masked
            copies = {key: tensor.clone() for key, tensor in weights.items()}
            getattr(model.model.layers[0].mlp, name).load_state_dict(copies, assign=True)
        found = generate(model, prompt(), 4)[1]
    assert calls
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    kernels._library.cache_clear()
    yield
    kernels._library.cache_clear()


def test_without_a_compiler_nothing_is_lost_but_speed(no_compiler):
    model = tiny("llama", torch.float32)
    with prune(model, PopConfig(0.4)) as session:
        generate(model, prompt(), 3)
    assert session.report.to_dict()["kernels"] == "stock"
    with pytest.raises(ConfigError, match=r"kernels='compiled' needs a C compiler .*: none was found. Install gcc"):
        prune(model, PopConfig(0.4, kernels="compiled"))


def test_a_compiler_that_fails_is_named(no_compiler, monkeypatch, tmp_path):
    broken = tmp_path / "broken-cc"
    broken.write_text("#!/bin/sh\necho 'no such option' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path / "cache"))
    assert "broken-cc failed: no such option" in kernels.why_not()
    with pytest.raises(ConfigError, match="broken-cc failed: no such option"):
        prune(tiny("llama", torch.float32), PopConfig(0.4, kernels="compiled"))


def test_a_cache_folder_that_cannot_be_written_is_no_error(no_compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POP_MM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert kernels.load("auto") is None
    assert kernels.why_not() is not None


@pytest.mark.parametrize("how", ["replaced", "moved in memory"])
@pytest.mark.parametrize("kind", ["stock", "compiled"])
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_input_weights_that_change_their_place_alone_are_followed(model_type, kind, how):
    found = {}
    for backend in "masked", "inplace":
        model = tiny(model_type, torch.float32)
        with pruned(model, backend, kernels=kind), torch.no_grad():
            cache = _cached(model)
            model(torch.tensor([[5]]), past_key_values=cache)
            for layer in model.model.layers:
                holder, name = (
                    (layer.mlp.experts, "gate_up_proj")
                    if model_type == "mixtral"
                    else (
                        layer.mlp.gate_proj,
                        "weight",
                    )
                )
                if how == "replaced":
                    setattr(holder, name, torch.nn.Parameter(getattr(holder, name) * 3))
                else:
                    getattr(holder, name).share_memory_()
                    getattr(holder, name).mul_(3)
            found[backend] = model(torch.tensor([[7]]), past_key_values=cache).logits
    torch.testing.assert_close(found["inplace"], found["masked"], rtol=0, atol=1e-4)


def test_another_default_device_does_not_matter():
    model = tiny("llama", torch.float32)
    with pruned(model, "inplace", kernels="compiled"), torch.no_grad():
        cache = _cached(model)
        model(torch.tensor([[5]]), past_key_values=cache)
        token, position, mask = torch.tensor([[5]]), torch.tensor([[10]]), torch.ones(1, 11)
        with torch.device("meta"):
            logits = model(token, past_key_values=cache, position_ids=position, attention_mask=mask).logits
    assert logits.device.type == "cpu" and bool(logits.isfinite().all())


def test_dtypes_that_differ_within_an_ffn_are_torchs_error():
    model = tiny("llama", torch.float32)
    with pruned(model, "inplace", kernels="compiled"), torch.no_grad():
        cache = _cached(model)
        model.model.layers[0].mlp.down_proj.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="dtype"):
            model(torch.tensor([[5]]), past_key_values=cache)


def test_a_machine_without_a_home_folder_is_no_error(no_compiler, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pop_mm.native.compiler.cache_folder", no_home)
    assert kernels.load("auto") is None
    assert "home directory" in kernels.why_not()
