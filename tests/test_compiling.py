"""A pruned forward pass is one graph, static in shape, that waits for no value; and compiled it agrees."""

import shutil

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine import compiling
from prunekit.registry import DataError, ModelError, NonFiniteError, SpecError
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from tests.test_empty_sites import GONE, by_hand, explicit, without

WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "is_nonzero", "masked_select", "unique", "__bool__"}
"""Operations whose result the host has to wait for, which no CUDA graph can hold."""


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before counts towards dynamo's limit of graphs."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def states(decoder, batches, **given):
    return [decoder(input_ids=b["input_ids"], use_cache=False, **given).last_hidden_state for b in batches]


VARIANTS = [
    ("llama-mha", {}),
    ("llama-gqa", {}),
    ("llama-gqa", {"attention_unit": "query_head"}),
    ("opt", {"compensate": "mean"}),
    ("qwen3", {"selector": {"ahead": True}}),
    ("mistral", {"history": {"dtype": "float16", "pool": 4}, "selector": "whole_batch"}),
]


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_the_whole_pass_is_one_graph(make_model, batches, family, options):
    """For batches that keep different units too, history learning included; none of it waits for the host."""
    model, graphs = make_model(family, num_hidden_layers=2), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    counter = CompileCounterWithBackend(backend)
    with prune(model, "pp", ratio=0.4, calibration=batches, **options) as pruned, torch.no_grad():
        expected = states(model.get_decoder(), batches)
        kept = pruned.kept()
        tables = [cut.history.table.clone() for cut in pruned._engine.cuts]
        pruned.reset()
        compiled = torch.compile(model.get_decoder(), fullgraph=True, backend=counter)
        found, seen = [], set()
        for batch in batches:
            found += states(compiled, [batch])
            seen.add(str(pruned.kept()))
        assert len(seen) > 1, "batches must keep different units, or the check proves little"
        assert pruned.kept() == kept
        for one, other in zip(
            expected + tables, found + [cut.history.table for cut in pruned._engine.cuts], strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    passes = [graph for graph in graphs if any("linear" in str(node.target) for node in graph.graph.nodes)]
    assert len(passes) == 1, "one graph for all batches"
    called = {getattr(node.target, "__name__", str(node.target)) for node in passes[0].graph.nodes}
    assert "linear" in called and not called & WAITS


def test_a_pass_that_waits_is_seen(make_model, batches, monkeypatch):
    """The negative control: a decision that looks at a value breaks the graph."""
    from prunekit.compress.engine import decider

    honest = decider.keep_highest

    def looking(scores, count):
        return honest(scores, count if float(scores.sum()) > -1 else 1)

    monkeypatch.setattr(decider, "keep_highest", looking)
    model = make_model("llama-gqa", num_hidden_layers=1)
    with prune(model, "pp", ratio=0.4, calibration=batches), torch.no_grad():
        compiled = torch.compile(model.get_decoder(), fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"(?i)graph|item|data.dependent|Unsupported"):
            states(compiled, batches[:1])


@pytest.fixture
def quick(monkeypatch):
    """runtime.compile without a compiler behind it, counting what is compiled."""
    compile_, counter = torch.compile, CompileCounterWithBackend("eager")
    counter.fullgraph = True

    def compiled(function, mode=None, **options):
        assert mode == "default"
        return compile_(function, backend=counter, fullgraph=counter.fullgraph, **options)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiling, "check_compiler", lambda device: None)
    return counter


COMPILED = {"runtime": {"compile": "default"}}


@pytest.mark.parametrize("use", ["pp", "wanda_sp"])
def test_the_runtime_compiles_passes_without_a_cache(make_model, batches, quick, use):
    model, ids = make_model("llama-gqa", num_hidden_layers=2), batches[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits

    def outcome(**runtime):
        with prune(model, use, ratio=0.4, calibration=batches, **runtime) as pruned, torch.no_grad():
            found = [model(b["input_ids"], use_cache=False).logits for b in batches]
            found.append(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
            kept = pruned.kept()
            found.append(model.generate(ids[:2], max_new_tokens=4, do_sample=False).float())
            with pruned.dense():
                found.append(model(ids, use_cache=False).logits)
            tables = [cut.history.table.clone() for cut in pruned._engine.cuts]
            return [*found, *tables], kept

    expected, kept = outcome()
    assert quick.frame_count == 0
    found, same = outcome(**COMPILED)
    assert kept == same
    # Pruned, pruned with padding, dense; whatever the batch keeps.
    assert quick.frame_count == 3
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(model.model)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, dense)


def test_what_cannot_be_compiled_runs_as_it_is(make_model, batches, quick):
    model, ids = make_model("llama-gqa", num_hidden_layers=1), batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches, **COMPILED) as pruned:
        model(ids, use_cache=False)  # with gradients
        with torch.no_grad():
            cache = model(ids).past_key_values  # a cache is what the configuration asks for
            model(ids[:, :1], past_key_values=cache)
            with pruned.watch(lambda step: torch.no_grad()):
                model(ids, use_cache=False)
            with FlopCounterMode(display=False):
                model(ids, use_cache=False)
            model(ids[:1, :8], use_cache=False)
        assert quick.frame_count == 0
        with torch.no_grad():
            model(ids, use_cache=False)
        assert quick.frame_count == 1
        with pruned.suspended():
            assert "forward" not in vars(model.model)
        assert "forward" in vars(model.model)


def test_a_batch_that_is_not_finite_or_too_long_is_refused_all_the_same(make_model, batches, quick):
    model, ids = make_model("llama-gqa", num_hidden_layers=1), batches[0]["input_ids"]
    quick.fullgraph = False  # else dynamo says in its own way that something was raised
    with prune(model, "pp", ratio=0.4, calibration=batches, **COMPILED) as pruned, torch.no_grad():
        expected = model(ids, use_cache=False).logits
        pruned.reset()
        embeddings = model.get_input_embeddings()(ids)
        embeddings[2, 3] = torch.nan
        with pytest.raises(NonFiniteError, match=r"layer 0 attention: .* the history is not changed|layer 0 .* scores"):
            model(inputs_embeds=embeddings, use_cache=False)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        with pytest.raises(DataError, match="longer than the history"):
            model(torch.cat([ids, ids], 1), use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_blocks_that_are_gone_are_left_out_of_the_graph(make_model, batches, quick, family):
    model, ids = make_model(family), batches[0]["input_ids"]
    reference = by_hand(model)
    dense, expected = (each(ids, use_cache=False).logits for each in (model, reference))
    with without(model, **COMPILED) as pruned:
        found = model(ids, use_cache=False).logits
        assert quick.frame_count == 1
        with pruned.dense():
            torch.testing.assert_close(model(ids, use_cache=False).logits, dense)
        torch.testing.assert_close(model(ids, use_cache=False).logits, found)
        generated = [each.generate(ids[:2], max_new_tokens=3, do_sample=False) for each in (model, reference)]
        assert torch.equal(*generated)
    torch.testing.assert_close(found, expected)
    assert (dense - expected).abs().max() > 0.1
    with prune(model, "wanda_sp", calibration=batches, allocator=explicit(GONE), compensate="mean") as pruned:
        expected = model(ids, use_cache=False).logits
        with pruned.suspended(), prune(model, pruned.strategy, calibration=batches, **COMPILED):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("options", [{"merger": {"momentum": 1.0}}, {"merger": "probe_only"}])
def test_what_is_not_finite_is_named_alike_where_nothing_is_learnt(make_model, batches, quick, options):
    model, said = make_model("llama-gqa", num_hidden_layers=1), []
    embeddings = model.get_input_embeddings()(batches[0]["input_ids"]).detach()
    embeddings[:, 3] = torch.nan
    for runtime in ({}, COMPILED):
        with prune(model, "pp", ratio=0.4, calibration=batches, **options, **runtime) as pruned, torch.no_grad():
            with pytest.raises(NonFiniteError, match="layer 0 attention: the scores") as raised:
                model(inputs_embeds=embeddings, use_cache=False)
            said.append(str(raised.value))
            model(batches[0]["input_ids"], use_cache=False)
            assert pruned._engine.shared.running.batch is None
    assert said[0] == said[1] and quick.frame_count == 2  # of embeddings, and of ids


@pytest.mark.parametrize(("use", "options"), [("wanda_sp", {}), ("flap", {"compensate": "mean"}), ("pp", {})])
def test_weights_that_change_are_seen_by_compiled_passes(make_model, batches, quick, use, options):
    model, ids = make_model("llama-gqa", num_hidden_layers=1), batches[0]["input_ids"]
    found = []
    layer, initial = model.model.layers[0].mlp, model.state_dict()
    initial = {name: tensor.clone() for name, tensor in initial.items()}
    for runtime in ({}, COMPILED):
        model.load_state_dict(initial)
        with prune(model, use, ratio=0.4, calibration=batches, **options, **runtime) as pruned, torch.no_grad():
            logits = [model(ids, use_cache=False).logits]
            layer.up_proj.weight.mul_(2)
            logits.append(model(ids, use_cache=False).logits)
            layer.down_proj.weight[:, :96] *= 30  # PP's score sees it
            logits.append(model(ids, use_cache=False).logits)
            found.append((logits, pruned.kept()))
    assert found[0][1] == found[1][1]
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    first, second, third = found[0][0]
    assert not torch.allclose(first, second, atol=1e-3) and not torch.allclose(second, third, atol=1e-3)


def test_somebody_elses_forward_is_left_to_them(make_model, batches, quick):
    model, seen = make_model("llama-gqa", num_hidden_layers=1), []
    inner = model.model.forward

    def theirs(*args, **kwargs):
        seen.append(1)
        return inner(*args, **kwargs)

    model.model.forward = theirs
    with prune(model, "pp", ratio=0.4, calibration=batches, **COMPILED), torch.no_grad():
        model(batches[0]["input_ids"], use_cache=False)
    assert vars(model.model)["forward"] is theirs and seen


def test_a_machine_without_a_compiler_is_named_at_once(make_model, batches, monkeypatch):
    from torch._inductor import cpp_builder, exc

    def none_found():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    model = make_model("llama-gqa", num_hidden_layers=1)
    with pytest.raises(ModelError, match=r"runtime.compile: .*C\+\+ compiler and finds none; install g\+\+"):
        prune(model, "pp", ratio=0.4, calibration=batches, **COMPILED)
    prune(model, "pp", ratio=0.4, calibration=batches).remove()


def test_it_excludes_a_trace_and_models_that_are_spread(make_model, batches):
    from accelerate import cpu_offload

    model = make_model("llama-gqa")
    with pytest.raises(SpecError, match=r"runtime.compile: default and a trace exclude each other"):
        prune(model, "pp", ratio=0.4, calibration=batches, trace=True, **COMPILED)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"runtime.compile: this model is spread .*leave compile out"):
        prune(model, "pp", ratio=0.4, calibration=batches, **COMPILED)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's compiler for CPUs needs one for C++")
def test_compiled_for_real(make_model, batches):
    model = make_model("llama-gqa", num_hidden_layers=1)
    found = []
    for runtime in ({}, COMPILED):
        with prune(model, "pp", ratio=0.4, calibration=batches, **runtime) as pruned, torch.no_grad():
            logits = [model(b["input_ids"], use_cache=False).logits for b in batches[:3]]
            found.append((logits, pruned.kept()))
    assert found[0][1] == found[1][1]
    for one, other in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
