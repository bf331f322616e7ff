"""The handle: what it reports, that everything is taken back, and that one model serves many strategies."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import DataError, ModelError, NonFiniteError, SpecError
from torch import nn

pytestmark = pytest.mark.smoke

STRATEGIES = ["pp", "full_batch_probing", "flap", "wanda_sp", "magnitude", "random"]


def fingerprint(model):
    """Everything a removal must bring back: parameters (identity, values, strides), attributes, hooks, classes."""
    seen = {"config": model.config.to_json_string(), "attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        attributes = {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str, bool, type(None)))}
        hooks = [len(module._forward_pre_hooks), len(module._forward_hooks), len(module._forward_hooks_always_called)]
        seen[name] = (type(module), sorted(module.__dict__), attributes, hooks)
    for name, parameter in model.named_parameters():
        seen["parameter " + name] = (id(parameter), parameter.stride(), parameter.detach().clone())
    return seen


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, value in before.items():
        if key.startswith("parameter"):
            assert value[:2] == after[key][:2]
            assert torch.equal(value[2], after[key][2]), key
        else:
            assert value == after[key], key


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "opt"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_removal_leaves_nothing(make_model, batches, strategy, family, unit):
    model = make_model(family)
    ids = batches[0]["input_ids"]
    before, keys = fingerprint(model), list(model.state_dict())
    dense = model(ids).logits
    with prune(model, strategy, ratio=0.4, calibration=batches, attention_unit=unit):
        assert list(model.state_dict()) == keys
        pruned_logits = model(ids).logits
    assert not torch.equal(pruned_logits, dense)
    assert_same(before, fingerprint(model))
    assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("strategy", ["pp", "flap"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_an_exception_in_the_middle_leaves_nothing(make_model, batches, family, strategy):
    model = make_model(family)
    before = fingerprint(model)
    ids = batches[0]["input_ids"]
    with prune(model, strategy, ratio=0.4, calibration=batches) as pruned:
        expected = model(ids, use_cache=False).logits
        pruned.reset()
        known = pruned._engine.histories()

        def fail(module, args):
            raise KeyboardInterrupt

        consumer = pruned._engine.cuts[-1].binding.consumer
        handle = consumer.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids, use_cache=False)
        handle.remove()
        for before_it, after_it in zip(known, pruned._engine.histories(), strict=True):
            assert before_it.table is None or torch.equal(before_it.table, after_it.table), "a failed batch taught"
        assert torch.equal(model(ids, use_cache=False).logits, expected), "the next batch must not see the failed one"
        with pruned.dense():
            consumer.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model(ids)
            consumer._forward_pre_hooks.clear()
        handle = consumer.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids)
        handle.remove()
    assert_same(before, fingerprint(model))


def test_failing_to_prune_leaves_nothing(make_model, batches):
    model = make_model("llama-gqa")
    before = fingerprint(model)
    with pytest.raises(DataError, match="calibration batch 1"):
        prune(model, "pp", ratio=0.4, calibration=[batches[0], {"ids": 3}])
    with pytest.raises(SpecError):
        prune(model, "pp", ratio=0.4, skip_layers=[0, 1, 2], calibration=batches)
    assert_same(before, fingerprint(model))

    class Quantised(nn.Linear):
        pass

    model.model.layers[1].mlp.down_proj.__class__ = Quantised
    before = fingerprint(model)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj is a .*Quantised"):
        prune(model, "pp", ratio=0.4, calibration=batches)
    assert_same(before, fingerprint(model))
    model = make_model("llama-gqa")
    broken = model.model.layers[2].mlp.up_proj.weight
    with torch.no_grad():
        broken[0, 0] = float("nan")
    before = fingerprint(model)
    with pytest.raises(NonFiniteError, match="layer 2 mlp"):
        prune(model, "pp", ratio=0.4, calibration=batches)
    after = fingerprint(model)
    key = next(k for k in before if k.startswith("parameter") and "layers.2.mlp.up_proj" in k)
    before.pop(key), after.pop(key)
    assert_same(before, after)


@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
def test_the_handle_is_harmless_after_removal(make_model, batches, strategy):
    model = make_model("opt")
    ids = batches[0]["input_ids"]
    before, dense = fingerprint(model), model(ids).logits
    pruned = prune(model, strategy, ratio=0.4, calibration=batches)
    pruned.remove()
    with pruned.dense():
        assert torch.equal(model(ids).logits, dense)
    pruned.reset()
    assert torch.equal(model(ids).logits, dense)
    assert pruned.active_parameters() == sum(p.numel() for p in model.parameters())
    assert_same(before, fingerprint(model))


@pytest.mark.parametrize("strategy", ["pp", "flap"])
def test_weights_may_change_while_pruned(make_model, batches, strategy):
    model = make_model("llama-gqa")
    ids = batches[0]["input_ids"]
    with prune(model, strategy, ratio=0.4, calibration=batches, merger=None, selector=None) as pruned:
        first = model(ids, use_cache=False).logits
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(0.5)
        second = model(ids, use_cache=False).logits
        assert not torch.equal(first, second)
        model.bfloat16()
        assert model(ids, use_cache=False).logits.dtype == torch.bfloat16
        model.float()
        weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_(True)
        with torch.inference_mode():
            model(ids, use_cache=False)
        for _ in range(2):
            model(ids, use_cache=False).logits.sum().backward()
        reached = int((weight.grad.abs().sum(0) > 0).sum())
        # A bias that compensates for what was dropped depends on the dropped columns too.
        assert reached == (192 if strategy == "flap" else pruned.counts[1, "mlp"])


def test_calibration_in_inference_and_training_mode(make_model, batches):
    model = make_model("opt", dropout=0.5)
    ids = batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        expected = [h.table for h in pruned._engine.histories()]
    model.train()
    with torch.inference_mode():
        pruned = prune(model, "pp", ratio=0.4, calibration=batches)
    assert not any(h.table.is_inference() for h in (cut.history for cut in pruned._engine.cuts))
    with torch.inference_mode():
        pruned.reset()
    assert model.training and model.model.decoder.layers[0].self_attn.training
    assert all(torch.equal(a, b.table) for a, b in zip(expected, pruned._engine.histories(), strict=True))
    model.eval()
    assert model(ids).logits.isfinite().all()
    pruned.remove()


def test_float32_statistics_whatever_the_default(make_model, batches):
    model = make_model("llama-gqa")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with prune(model, "flap", ratio=0.4, calibration=batches) as pruned:
            assert {h.table.dtype for h in pruned._engine.histories()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_two_prunings_at_once_are_refused(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "magnitude", ratio=0.4) as first:
        with pytest.raises(ModelError, match=r"already part of a pruned model"):
            prune(model, "pp", ratio=0.4, calibration=batches)
        assert model(batches[0]["input_ids"]).logits.isfinite().all()
        first.remove()
        first.remove()
    with prune(model, "pp", ratio=0.4, calibration=batches):
        pass


def test_counts_and_parameters(make_model, batches):
    model = make_model("llama-gqa")
    total = sum(p.numel() for p in model.parameters())
    with prune(model, "pp", ratio=0.5, calibration=batches) as pruned:
        assert pruned.counts == {(i, k): n for i in range(3) for k, n in (("attention", 2), ("mlp", 96))}
        gone = 3 * (2 * 128 * 16 * (2 + 1 + 1 + 2) + 96 * 3 * 128)
        assert pruned.active_parameters() == total - gone
        with pruned.dense():
            assert pruned.active_parameters() == total


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_cut_is_nothing_changed(make_model, batches, strategy):
    model = make_model("llama-gqa")
    dense = model(batches[0]["input_ids"]).logits
    with prune(model, strategy, ratio=0.0, calibration=batches) as pruned:
        assert torch.equal(model(batches[0]["input_ids"]).logits, dense)
        assert all(count == site.units for count, site in zip(pruned.counts.values(), pruned.sites, strict=True))


def test_dense_inside_and_reset(make_model, batches):
    model = make_model("opt")
    ids = [b["input_ids"] for b in batches]
    dense = model(ids[0]).logits
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
        first = [model(x, use_cache=False).logits for x in ids]
        with pruned.dense():
            assert torch.equal(model(ids[0]).logits, dense)
        again = [model(x, use_cache=False).logits for x in ids]
        assert any(not torch.equal(a, b) for a, b in zip(first, again, strict=True)), "history should have learnt"
        pruned.reset()
        repeated = [model(x, use_cache=False).logits for x in ids]
        assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))
        decisions = [(r["batch"], r["kept"]) for r in pruned.trace]
        assert decisions[: len(decisions) // 3] == decisions[-len(decisions) // 3 :]


def test_trace_records(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches, skip_layers=[0], trace=True) as pruned:
        for batch in batches[:2]:
            model(**batch)
        keys = [(r["batch"], r["layer"], r["kind"]) for r in pruned.trace]
    assert keys == [(b, i, k) for b in (0, 1) for i in (1, 2) for k in ("attention", "mlp")]
    for record in pruned.trace:
        assert list(record) == ["batch", "layer", "kind", "kept", "rows", "positions"]
        for part in ("kept", "rows", "positions"):
            assert record[part] == sorted(set(record[part]))
        assert len(record["positions"]) == 12 and len(record["rows"]) == 1
    with prune(model, "flap", ratio=0.4, calibration=batches, trace=True) as pruned:
        model(**batches[0])
        assert [r["batch"] for r in pruned.trace] == [None] * 6
