"""What is done for speed changes nothing but speed: the same units are kept, and logits agree up to rounding."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from prunekit.compress import Pipeline, prune
from prunekit.compress.engine import batch as batch_module
from prunekit.compress.engine import hooks, linears
from prunekit.compress.engine.ahead import SideStreams
from prunekit.compress.engine.batch import ProbeProducts
from prunekit.compress.engine.runtime import Runtime
from prunekit.registry import SpecError
from prunekit.strategies.application import Slice

OFF = {"column_major": False, "shared_buffers": False, "reuse_probe": False, "overlap": False}
PRODUCERS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
FAMILIES = ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"]


class Plain(Slice):
    """Copies rows and columns itself, as a third-party applier does."""

    def producer(self, weight, bias, rows):
        return weight[rows], None if bias is None else bias[rows]

    def consumer(self, weight, columns):
        return weight[:, columns]


def run(model, batches, mask=None, **options):
    """Logits of four batches one after the other, what was kept in each, and the histories afterwards."""
    options = {"ratio": 0.4, "calibration": batches, "trace": True, **options}
    with prune(model, "pp", **options) as pruned, torch.no_grad():
        logits = [model(b["input_ids"], attention_mask=mask, use_cache=False).logits for b in batches]
        tables = [cut.history.table.clone() for cut in pruned._engine.cuts]
    return logits, [(r["layer"], r["kind"], r["kept"]) for r in pruned.trace], tables


def agree(one, other):
    assert one[1] == other[1], "the same units must be kept"
    for a, b in zip(one[0] + one[2], other[0] + other[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("without", ["column_major", "shared_buffers", "reuse_probe", "everything"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_agrees_with_none_of_it(make_model, batches, family, without):
    model = make_model(family)
    changed = OFF if without == "everything" else {without: False}
    agree(run(model, batches), run(model, batches, runtime=changed))


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_with_padding_and_with_an_applier_that_does_it_itself(make_model, batches, unit, side):
    model = make_model("llama-gqa")
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[1, :7] = 0
    mask = mask.flip(1) if side == "right" else mask
    options = dict(mask=mask, attention_unit=unit)
    agree(run(model, batches, **options), run(model, batches, applier=Plain(), **options))


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_static_cuts_and_compensation_agree_too(make_model, batches, family):
    model, ids = make_model(family), batches[0]["input_ids"]
    for use, compensate in (("flap", "mean"), ("wanda_sp", "least_squares"), ("pp", "least_squares"), ("pp", "mean")):
        found = []
        for runtime in ({}, OFF):
            options = dict(ratio=0.4, calibration=batches, compensate=compensate, runtime=runtime)
            with prune(model, use, **options) as pruned, torch.no_grad():
                found.append((model(ids, use_cache=False).logits, pruned.kept()))
        assert found[0][1] == found[1][1]
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=2e-5)


def test_sites_of_different_widths_agree(make_model, batches):
    model = make_model("llama-gqa")
    allocator = {"name": "explicit", "attention": [0.5, 0.25, 0.5], "mlp": [0.6, 0.4, 0.2]}
    options = dict(ratio=None, allocator=allocator)
    agree(run(model, batches, **options), run(model, batches, runtime=OFF, **options))


# Gradients


def test_gradients_find_the_weights_that_the_forward_used(make_model, batches):
    """Frozen weights, but something before them learns: the backward needs every layer's own weights again."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    grads = []
    for runtime in ({}, OFF):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        with prune(model, "pp", ratio=0.4, calibration=batches, runtime=runtime):
            model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert grads[0].abs().max() > 1e-4


def test_gradients_of_a_step_outlive_the_next_prompt(make_model, batches):
    """A step's backward needs the weights that its prompt gathered, whatever was gathered since."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    grads = []
    for runtime in ({}, OFF):
        embeddings = model.get_input_embeddings()(ids[:, :1]).detach().requires_grad_()
        with prune(model, "pp", ratio=0.4, calibration=batches, runtime=runtime):
            with torch.no_grad():
                cache = model(ids, use_cache=True).past_key_values
            loss = model(inputs_embeds=embeddings, past_key_values=cache).logits.square().mean()
            with torch.no_grad():
                model(batches[1]["input_ids"], use_cache=True)
            loss.backward()
        grads.append(embeddings.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
    assert grads[0].abs().max() > 1e-4


# Work on another stream


class Beside(SideStreams):
    """Pretends that there is a second stream, as on a CUDA device, and records what is done on it."""

    def __init__(self, wanted):
        super().__init__(wanted)
        self.begun, self.joined, self.shared, self.used = 0, 0, [], True

    @contextmanager
    def work(self, x):
        self.begun += 1
        yield

    def join(self):
        self.joined += 1

    def share(self, *made):
        self.shared += made


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("options", [{}, {"selector": {"ahead": True}}])
def test_work_beside_the_models_own_agrees(make_model, batches, family, options, monkeypatch):
    """What the second stream gathers and learns is used: with a cache, without, and where sites stay whole."""
    model, made = make_model(family), []

    def side(wanted):
        made.append(Beside(wanted))
        return made[-1]

    allocator = {"name": "explicit", "attention": [0.5, 0.5, 0.5], "mlp": [0.4, 0, 0.4]}
    for given in ({}, {"ratio": None, "allocator": allocator}):
        found = []
        for faked in (False, True):
            with monkeypatch.context() as patched:
                if faked:
                    patched.setattr(hooks, "SideStreams", side)
                found.append(run(model, batches, **options, **given))
                full = {"ratio": 0.4, "calibration": batches, **options, **given}
                with prune(model, "pp", **full) as pruned, torch.no_grad():
                    tokens = model.generate(batches[0]["input_ids"][:2], max_new_tokens=5, do_sample=False)
                    found[-1] += (tokens, pruned.kept())
        agree(found[0], found[1])
        assert torch.equal(found[0][3], found[1][3]) and found[0][4] == found[1][4]
    assert all(side.begun and side.joined for side in made)
    assert any(tensor is not None for side in made for tensor in side.shared)


def test_inference_mode_and_back(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches, merger={"momentum": 1.0}):
        with torch.inference_mode():
            first = model(ids, use_cache=False).logits.clone()
        with torch.no_grad():
            second = model(ids, use_cache=False).logits
    torch.testing.assert_close(first, second, rtol=0, atol=0)


# The probe's own products


@pytest.fixture
def reused(monkeypatch):
    """Counts the producers that took over what the probe had made."""
    count, linear = [], ProbeProducts.linear

    def counting(self, *args):
        count.append(args[0])
        return linear(self, *args)

    monkeypatch.setattr(ProbeProducts, "linear", counting)
    return count


def test_the_probes_products_are_taken_over_in_small_float32_batches(make_model, batches, reused, monkeypatch):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]

    def producers(use="pp", call=lambda: model(ids, use_cache=False), **options):
        reused.clear()
        with prune(model, use, ratio=0.4, calibration=batches, **options), torch.no_grad():
            call()
        return len(reused)

    assert producers() == 3 * 5
    assert producers(runtime={"reuse_probe": False}) == producers(applier="zero") == producers(selector="spread") == 0
    assert producers("reconstruct") == 0
    assert producers(call=lambda: model(ids, use_cache=True)) == 3 * 5
    with torch.enable_grad():
        assert producers(call=lambda: torch.enable_grad()(lambda: model(ids, use_cache=False))()) == 0

    def lowered():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids, use_cache=False)

    assert producers(call=lowered) == 0
    monkeypatch.setattr(batch_module, "REUSED_UP_TO", 4 * 24 - 1)
    assert producers() == 0


def test_half_precision_computes_them_again(make_model, batches, reused):
    model = make_model("llama-gqa").to(torch.bfloat16)
    with prune(model, "pp", ratio=0.4, calibration=batches), torch.no_grad():
        model(batches[0]["input_ids"], use_cache=False)
    assert not reused


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_full_batch_probing_makes_every_product_once(make_model, batches, family, reused):
    model = make_model(family)
    found = run(model, batches, selector="whole_batch")
    assert reused
    agree(found, run(model, batches, selector="whole_batch", runtime=OFF))


def test_what_is_taken_over_reaches_the_logits(make_model, batches, monkeypatch):
    """The negative control: a probe whose products are off moves the logits."""
    model = make_model("llama-gqa")
    right = run(model, batches[:1])
    linear = ProbeProducts.linear

    def off(self, producer, *rest):
        self.outputs[producer] = self.outputs[producer] + 0.5
        return linear(self, producer, *rest)

    monkeypatch.setattr(ProbeProducts, "linear", off)
    wrong = run(model, batches[:1])
    assert (wrong[0][0] - right[0][0]).abs().max() > 1e-2


def test_a_producer_that_reads_something_else_computes_it_all(make_model, batches, reused):
    """Where a block transforms what it was given before a producer reads it, the probe's product is not that one's."""
    model = make_model("llama-gqa")
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.5 + 0.1,))
    agree(run(model, batches), run(model, batches, runtime=OFF))
    assert {id(producer) for producer in reused} == {
        id(module) for name, module in model.named_modules() if name.rpartition(".")[2] in PRODUCERS - {"up_proj"}
    }


# Products that read kept rows and columns where they lie


@pytest.mark.parametrize(("family", "column_major"), [("llama-gqa", True), ("opt", True), ("llama-gqa", False)])
def test_fused_products_are_chosen_where_the_kernel_can_read(make_model, batches, monkeypatch, family, column_major):
    """With stand-ins for the kernels, which Triton's interpreter runs in tests/test_kernels.py."""
    model, called = make_model(family), []

    def rows(x, weight, index, bias):
        called.append("rows")
        return torch.nn.functional.linear(x, weight[index], bias)

    def columns(x, weight, index, bias):
        called.append("columns")
        return torch.nn.functional.linear(x, weight[:, index], bias)

    runtime = {"fused_gather": True, "column_major": column_major}
    expected = run(model, batches, runtime=OFF)
    kernels = SimpleNamespace(linear_of_rows=rows, linear_of_columns=columns)
    monkeypatch.setitem(sys.modules, "prunekit.compress.engine.fused_linear", kernels)
    monkeypatch.setattr(linears, "usable_on", lambda tensor: True)
    agree(expected, run(model, batches, runtime=runtime))
    layers, batches_run = 3, len(batches)
    assert called.count("rows") == {"llama-gqa": 5, "opt": 4}[family] * layers * batches_run
    assert called.count("columns") == (2 * layers * batches_run if column_major else 0)
    called.clear()
    run(model, batches[:1], runtime=runtime, compensate="mean")
    assert "columns" not in called, "a compensated consumer computes with a weight and a bias of its own"
    called.clear()
    run(model, batches[:1], runtime=runtime, applier=Plain())
    assert not called


# As an option


def test_options_are_checked(make_model, batches):
    model = make_model("llama-gqa")
    for runtime, said in (
        ({"colum_major": False}, r"runtime.colum_major: unknown key \(did you mean 'column_major'\?\)"),
        ({"compile": "fast"}, r"runtime.compile: should be 'default'.* \(found 'fast'\)"),
        (
            {"shared_buffers": "perhaps"},
            r"runtime.shared_buffers: should be true or false, not text \(found 'perhaps'\)",
        ),
        (3, r"runtime: expected a mapping of column_major, .* \(found 3\)"),
    ):
        with pytest.raises(SpecError, match=said):
            prune(model, "pp", ratio=0.4, calibration=batches, runtime=runtime)
    assert Runtime().model_dump() == {
        "column_major": True,
        "shared_buffers": True,
        "reuse_probe": True,
        "fused_gather": False,
        "overlap": True,
        "compile": None,
    }


def test_a_pipeline_file_sets_it_and_results_say_so():
    content = {
        "prune": {"use": "pp", "ratio": 0.4},
        "calibration": {"sequences": 4, "length": 64},
        "evaluate": [{"name": "perplexity", "window": 64, "limit": 4}],
        "runtime": {"shared_buffers": False},
    }
    data = Pipeline(content).measure().record
    assert data.runtime == {**Runtime().model_dump(), "shared_buffers": False}
    default = Pipeline({key: value for key, value in content.items() if key != "runtime"}).measure().record
    one, other = (found.metrics[0].pruned["perplexity"] for found in (data, default))
    assert one == pytest.approx(other, rel=1e-5)
