"""What least squares fits after a joint choice: the dense weights, the dense outputs, or the dense residual stream."""

from dataclasses import replace

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.models.exported.classes import register
from prunekit.registry import (
    ModelError,
)
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.compensation import LeastSquares
from prunekit.strategies.obs import ObsChooser
from transformers import AutoModelForCausalLM

from tests.test_choosers import CHANNELS, covariance_of, draw, inputs_of, sample
from tests.test_families import served, tiny


def test_the_refit_is_that_of_normal_equations_with_a_constant():
    x, weight, kept = sample().double(), draw(20, CHANNELS).double(), torch.arange(0, CHANNELS, 2)
    dropped = torch.arange(1, CHANNELS, 2)
    features = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    second, chosen = features.T @ features, [*kept.tolist(), CHANNELS]
    refitted = torch.linalg.solve(second[chosen][:, chosen], second[chosen][:, :CHANNELS] @ weight.T).T
    compensator, known = LeastSquares(ridge=1e-9), covariance_of(x)
    (slope,) = compensator.slope(compensator.prepare(replace(known, kept=kept)), kept, dropped)
    folded = weight[:, kept] + weight[:, dropped] @ slope
    torch.testing.assert_close(folded, refitted[:, :-1], rtol=1e-4, atol=1e-5)
    bias = weight @ known.mean - folded @ known.mean[kept]
    torch.testing.assert_close(bias, refitted[:, -1], rtol=1e-4, atol=1e-4)


def test_dense_outputs_are_fitted_exactly_where_pruned_inputs_determine_them():
    x, kept, dropped = sample().double(), torch.arange(0, CHANNELS, 2), torch.arange(1, CHANNELS, 2)
    pruned = draw(300, CHANNELS, seed=5).double()
    dense = pruned[:, kept] @ draw(12, CHANNELS, seed=6).double()
    x, y = pruned - pruned.mean(0), dense - dense.mean(0)
    compensator = LeastSquares(target="dense_outputs", ridge=1e-9)
    known = replace(covariance_of(pruned), kept=kept, cross=y.T @ x / 300)
    (slope,) = compensator.slope(compensator.prepare(known), kept, dropped)
    weight = draw(20, CHANNELS).double()
    folded = weight[:, kept] + weight @ slope
    torch.testing.assert_close(x[:, kept] @ folded.T, y @ weight.T, rtol=1e-4, atol=1e-4)


def test_both_targets_agree_where_the_streams_do():
    kept, dropped = torch.arange(0, CHANNELS, 2), torch.arange(1, CHANNELS, 2)
    weight, found = draw(20, CHANNELS), []
    no_lag = torch.zeros(20, CHANNELS)
    for target in ("dense_weights", "dense_outputs", "dense_stream"):
        compensator, known = LeastSquares(target=target, ridge=0.1), replace(covariance_of(sample()), kept=kept)
        if target != "dense_weights":
            known.cross = torch.cat([known.matrix, no_lag[: 20 * (target == "dense_stream")]])
        (slope,) = compensator.slope(compensator.prepare(known), kept, dropped)
        assert not slope[CHANNELS:].any()
        found.append((weight[:, dropped] if target == "dense_weights" else weight) @ slope[:CHANNELS])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(found[2], found[1])
    matrix = covariance_of(sample()).matrix
    unit_orders = [
        ObsChooser(ridge=0.1).order(replace(covariance_of(sample()), cross=cross), weight, some_site("mlp")).units
        for cross in (None, matrix, torch.cat([matrix, no_lag]))
    ]
    assert torch.equal(unit_orders[1], unit_orders[0]) and torch.equal(unit_orders[2], unit_orders[0])


def test_the_lag_counts_like_outputs_that_the_weights_should_have_made():
    """The covariance of what the dense model adds, lag included, with the channels is all that order and slope read."""
    x, kept, dropped = sample(), torch.arange(0, CHANNELS, 2), torch.arange(1, CHANNELS, 2)
    weight, change, known = draw(20, CHANNELS), draw(20, CHANNELS, seed=7), covariance_of(x)
    orders, weights = [], []
    for lag, dense_weight in ((change @ known.matrix, weight), (torch.zeros(20, CHANNELS), weight + change)):
        given = replace(covariance_of(x), kept=kept, cross=torch.cat([known.matrix, lag]))
        chooser = ObsChooser(ridge=1e-6, rounds=CHANNELS)
        orders.append(chooser.order(given, dense_weight, some_site("mlp")).units)
        compensator = LeastSquares(target="dense_stream", ridge=1e-6)
        (slope,) = compensator.slope(compensator.prepare(given), kept, dropped)
        weights.append(dense_weight[:, kept] + dense_weight @ slope[:CHANNELS] + slope[CHANNELS:])
    assert torch.equal(*orders)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("target", ["dense_weights", "dense_outputs", "dense_stream"])
def test_what_is_exported_computes_the_same(make_model, batches, tmp_path, family, target):
    register()
    model, ids = make_model(family), batches[0]["input_ids"]
    options = dict(ratio=0.4, calibration=batches, compensate={"target": target})
    with prune(model, "obs", **options) as pruned:
        expected = model(ids).logits
        shifts = [cut.compensation.shift for cut in pruned._engine.cuts]
        folder = pruned.save(tmp_path / "out")
    assert all((shift is not None and bool(shift.any())) == (target != "dense_weights") for shift in shifts[2:])
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder)(ids).logits, expected, rtol=1e-4, atol=1e-4)


def refitted(module, x, target, kept, ridge):
    """Hook that computes a linear layer from its kept inputs, by ridge regression of the target."""
    weight, mean = module.weight.double(), x.mean(0)
    centred = x - mean
    second, cross = centred.T @ centred / len(x), centred.T @ (target - target.mean(0)) / len(x)
    added = ridge * second.diagonal().mean() * torch.eye(len(second)).double()
    solved = torch.linalg.solve((second + added)[kept][:, kept], (cross + added @ weight.T)[kept])
    bias = target.mean(0) - solved.T @ mean[kept]
    return lambda module, args, output: (args[0][..., kept].double() @ solved + bias).float()


@pytest.mark.parametrize("target", ["dense_weights", "dense_outputs", "dense_stream"])
def test_sequential_obs_is_what_a_slow_implementation_gives(make_model, batches, target):
    model, slow = make_model("llama-gqa"), make_model("llama-gqa")
    options = dict(compensate={"ridge": 0.01, "target": target}, scorer={"ridge": 0.01, "rounds": 8})
    with prune(model, "obs", ratio=0.4, calibration=batches, **options) as pruned, torch.no_grad():
        for layer in range(3):
            sites = [site for site in pruned.sites if site.layer == layer]
            with pruned.dense():
                dense = [[inputs_of(model, place, batches) for place in (site.consumer, site.norm)] for site in sites]
            inputs = [[inputs_of(slow, place, batches) for place in (site.consumer, site.norm)] for site in sites]
            for site, (x, stream), (dense_x, dense_stream) in zip(sites, inputs, dense, strict=True):
                module, lag = slow.get_submodule(site.consumer), dense_stream - stream
                aim = (x if target == "dense_weights" else dense_x) @ module.weight.T.double()
                kept = site.columns(torch.tensor(pruned.sites_kept[layer, site.kind]))
                centred, known = x - x.mean(0), covariance_of(x.float())
                if target == "dense_stream":
                    aim, dense_x = aim + lag, torch.cat([dense_x, lag], 1)
                if target != "dense_weights":
                    known.cross = ((dense_x - dense_x.mean(0)).T @ centred / len(x)).float()
                order = ObsChooser(ridge=0.01, rounds=8).order(known, module.weight.float(), site)
                expected = order.units[site.units - pruned.counts[layer, site.kind] :].sort().values
                assert expected.tolist() == list(pruned.sites_kept[layer, site.kind])
                if len(kept) < site.channels:
                    module.register_forward_hook(refitted(module, x, aim, kept, 0.01))
        torch.testing.assert_close(model(**batches[0]).logits, slow(**batches[0]).logits, rtol=1e-2, atol=1e-2)


def mean_stream(model, layer, batches):
    """The mean over all tokens of what a layer leaves in the residual stream."""
    place = f"model.layers.{layer + 1}.input_layernorm" if layer + 1 < len(model.model.layers) else "model.norm"
    return inputs_of(model, place, batches).mean(0)


def test_the_stream_after_a_site_keeps_the_mean_of_the_dense_model(make_model, batches):
    model = make_model("llama-gqa")
    expected = [mean_stream(model, layer, batches) for layer in range(3)]
    shares = {"name": "explicit", "attention": (0, 0, 0), "mlp": (0.5, 1, 0.25)}  # layer 1 has no MLP then
    for target, right in (("dense_stream", True), ("dense_outputs", False)):
        with prune(model, "obs", allocator=shares, calibration=batches, compensate={"target": target}):
            found = [mean_stream(model, layer, batches) for layer in range(3)]
        close = [torch.allclose(one, other, atol=1e-4) for one, other in zip(found, expected, strict=True)]
        assert close == [True, right, right]


@pytest.mark.parametrize("place", ["self_attn", "mlp"])
def test_a_stream_that_a_site_does_not_add_to_as_it_is_is_refused(make_model, batches, place):
    model, before = make_model("llama-gqa"), {}
    block = getattr(model.model.layers[1], place)

    def scaled(module, args, output):
        return (output[0] * 0.9, *output[1:]) if isinstance(output, tuple) else output * 0.9

    block.register_forward_hook(scaled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = "attention" if place == "self_attn" else "mlp"
    with pytest.raises(ModelError, match=f"layer 1 {kind}: what .* is not added to the residual stream as it is"):
        prune(model, "obs", ratio=0.4, calibration=batches, compensate={"target": "dense_stream"})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == 1
    prune(model, "obs", ratio=0.4, calibration=batches, compensate={"target": "dense_outputs"}).remove()


@pytest.mark.parametrize(
    ("kind", "added"),
    {
        "starcoder2": True,
        "opt": True,
        "gemma2": False,  # a norm follows
        "granite": False,  # a factor
        "cohere": False,  # parallel blocks
        "exaone4": False,  # a norm follows, none comes before
        "qwen2_moe": False,  # routed experts next to the shared one
        "llama4_text": False,  # routed experts add to the shared one's output in place
        "jamba": False,  # a layer of routed experts alone
        "qwen3_5_text": True,  # its linear attention comes before the stream that the MLP reads
        "gpt2": True,
        "bloom": True,  # a block adds the stream itself
        "gptj": False,  # parallel blocks
        "olmo2": False,  # a norm follows
    }.items(),
)
def test_the_residual_stream_is_fitted_only_where_sites_add_to_it(kind, added):
    served(kind)
    model, ids = tiny(kind).eval(), torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(0))
    options = dict(ratio=0.3, calibration=[{"input_ids": ids}], compensate={"target": "dense_stream"}, experts="keep")
    if added:
        prune(model, "obs", **options).remove()
        return
    with pytest.raises(ModelError, match="is not added to the residual stream as it is"):
        prune(model, "obs", **options)
