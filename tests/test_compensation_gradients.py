"""Compensation under gradients and autocast: differentiable, and always computed in float32."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog

COMPENSATIONS = ["mean", "probe_mean", "least_squares", {"name": "low_rank_least_squares", "rank": 8}]


def last_mlp(model):
    return model.get_submodule(find_sites(model, Catalog.discover(), "kv_group")[1][-1].consumer)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("compensate", COMPENSATIONS)
def test_gradients_reach_dropped_columns_and_biases(make_model, batches, family, compensate):
    model = make_model(family)
    consumer, ids = last_mlp(model), batches[0]["input_ids"]

    def loss():
        pruned.reset()  # so that every pass draws the same probe
        return model(ids, use_cache=False).logits.double().log_softmax(-1)[:, :, 3].mean()

    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate=compensate) as pruned:
        dropped = [unit for unit in range(192) if unit not in pruned.kept()[2, "mlp"]]
        consumer.weight.requires_grad_(True)
        if consumer.bias is not None:
            consumer.bias.requires_grad_(True)
        loss().backward()
        found = consumer.weight.grad[:, dropped]
        direction = found / found.norm()
        with torch.no_grad():
            step = 0.05
            consumer.weight[:, dropped] += step * direction
            above = loss()
            consumer.weight[:, dropped] -= 2 * step * direction
            below = loss()
        assert found.norm() > 1e-5
        assert float((above - below) / (2 * step)) == pytest.approx(float((found * direction).sum()), rel=0.05)
        assert consumer.bias is None or consumer.bias.grad.norm() > 0


def test_gathered_biases_can_be_trained_alone_with_accumulated_gradients(make_model, batches):
    model = make_model("opt")
    fc1, fc2 = model.model.decoder.layers[2].fc1, last_mlp(model)
    with prune(model, "flap", ratio=0.4, calibration=batches):
        biases = [linear.bias.requires_grad_(True) for linear in (fc1, fc2)]
        losses = []
        for _ in range(2):
            gradients = []
            for _ in range(2):  # nothing is kept of a pass whose backward is done
                loss = model(batches[0]["input_ids"], use_cache=False).logits.square().mean()
                loss.backward()
                gradients.append([bias.grad.clone() for bias in biases])
            for once, twice in zip(*gradients, strict=True):
                assert once.abs().sum() > 0
                torch.testing.assert_close(twice, 2 * once)
            losses.append(loss.item())
            with torch.no_grad():
                for bias in biases:
                    bias -= 0.02 * bias.grad
                    bias.grad = None
        assert losses[1] < losses[0]


@pytest.mark.parametrize("strategy", ["wanda_sp", "pp"])
@pytest.mark.parametrize("compensate", COMPENSATIONS)
def test_autocast_leaves_no_trace(make_model, batches, strategy, compensate):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    options = dict(ratio=0.4, calibration=batches, compensate=compensate, merger=None, selector=None)
    if strategy == "pp":
        options |= {"merger": {"name": "importance_scaled", "momentum": 1}, "selector": "residual_norm"}
    with torch.no_grad():
        with prune(model, strategy, **options):
            expected = model(ids, use_cache=False).logits
        with prune(model, strategy, **options) as pruned:
            with torch.autocast("cpu", torch.bfloat16):
                model(ids, use_cache=False)
            pruned.reset()
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=0)
