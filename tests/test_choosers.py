"""Joint choice: the order of brute force, nested cuts, exact refits, and what is refused by name."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import Catalog, Chooser, MemoryPlan, NonFiniteError, Order, SiteCovariance, SpecError
from prunekit.registry.checks import check_component
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.compensation import LeastSquares
from prunekit.strategies.modegpt import ModegptChooser
from prunekit.strategies.obs import ObsChooser

CHANNELS = 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sample(tokens=300, seed=0):
    return draw(tokens, CHANNELS, seed=seed) @ draw(CHANNELS, CHANNELS, seed=seed + 1) + 1


def covariance_of(x, **more):
    centred = x - x.mean(0)
    return SiteCovariance(centred.T @ centred / len(x), len(x), None, True, mean=x.mean(0), **more)


def brute_force(matrix, weight, size):
    """Every time the unit without which least squares leaves the smallest error; the order and the errors."""
    left, order, losses = list(range(len(matrix) // size)), [], []

    def error(units):
        kept = [c for unit in units for c in range(unit * size, (unit + 1) * size)]
        dropped = [c for c in range(len(matrix)) if c not in kept]
        rest = matrix[dropped][:, dropped]
        if kept:
            across = matrix[kept][:, dropped]
            rest = rest - across.T @ torch.linalg.solve(matrix[kept][:, kept], across)
        return float((weight[:, dropped] @ rest * weight[:, dropped]).sum())

    while left:
        errors = [error([unit for unit in left if unit != gone]) for gone in left]
        best = min(range(len(left)), key=errors.__getitem__)
        order.append(left.pop(best))
        losses.append(errors[best])
    return order, torch.tensor(losses) / losses[-1]


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_is_that_of_brute_force(kind, seed):
    site, weight, known = some_site(kind), draw(20, CHANNELS, seed=seed), covariance_of(sample(seed=seed))
    ridge = 1e-3 * known.matrix.diagonal().mean() * torch.eye(CHANNELS)
    order, losses = brute_force((known.matrix + ridge).double(), weight.double(), site.unit_size)
    found = ObsChooser(ridge=1e-3, rounds=CHANNELS).order(known, weight, site)
    assert found.units.tolist() == order
    torch.testing.assert_close(found.loss, losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rounds", [1, 3, 24])
def test_losses_are_exact_whatever_the_rounds(rounds):
    site, weight, known = some_site("mlp"), draw(20, CHANNELS), covariance_of(sample())
    matrix = (known.matrix + 1e-3 * known.matrix.diagonal().mean() * torch.eye(CHANNELS)).double()
    found = ObsChooser(ridge=1e-3, rounds=rounds).order(known, weight, site)
    kept, gone = (found.units[part].sort().values for part in (slice(9, None), slice(9)))
    left = matrix[gone][:, gone] - matrix[gone][:, kept] @ torch.linalg.solve(
        matrix[kept][:, kept], matrix[kept][:, gone]
    )
    lost = weight[:, gone].double()
    whole = (weight.double() @ matrix * weight.double()).sum()
    assert float(found.loss[8]) == pytest.approx(float((lost @ left * lost).sum() / whole), rel=1e-4)


def test_more_rounds_lose_less():
    site, weight = some_site("mlp"), draw(20, CHANNELS)
    losses = [ObsChooser(rounds=n, ridge=1e-3).order(covariance_of(sample()), weight, site).loss[11] for n in (1, 24)]
    assert losses[1] < losses[0]


def test_scores_are_all_different_and_cuts_are_nested():
    order = Order(torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 0.0, 0.5, 0.5]))
    scores = order.scores
    assert scores.argsort().tolist() == [2, 0, 3, 1] and len(scores.unique()) == 4


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
    for target in ("dense_weights", "dense_outputs"):
        compensator, known = LeastSquares(target=target, ridge=0.1), replace(covariance_of(sample()), kept=kept)
        known.cross = known.matrix.clone() if target == "dense_outputs" else None
        (slope,) = compensator.slope(compensator.prepare(known), kept, dropped)
        found.append((weight if target == "dense_outputs" else weight[:, dropped]) @ slope)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    unit_orders = [
        ObsChooser(ridge=0.1).order(replace(covariance_of(sample()), cross=cross), weight, some_site("mlp")).units
        for cross in (None, covariance_of(sample()).matrix)
    ]
    assert torch.equal(*unit_orders)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_modegpt_is_ridge_leverage(kind):
    site, known = some_site(kind), covariance_of(sample())
    second = (known.matrix + torch.outer(known.mean, known.mean)).double() * 300
    leverage = (second @ torch.linalg.inv(second + 0.01 * torch.eye(CHANNELS))).diagonal().view(site.units, -1).sum(1)
    order = ModegptChooser(centred=False, absolute=True).order(known, draw(20, CHANNELS), site)
    assert order.units.tolist() == leverage.argsort().tolist()


def test_an_indefinite_covariance_gets_a_larger_ridge():
    known = covariance_of(sample())
    known.matrix -= 0.01 * known.matrix.diagonal().mean() * torch.eye(CHANNELS)
    few = SiteCovariance(known.matrix - 0.05 * known.matrix.diagonal().mean() * torch.eye(CHANNELS), 300, None, True)
    ObsChooser(ridge=1e-4).order(few, draw(20, CHANNELS), some_site("mlp"))
    assert few.diagnostics["ridge"] > 1e-4


class Reversed(Chooser):
    """The last unit goes first."""

    name: Literal["reversed"] = "reversed"

    def order(self, covariance, weight, site):
        return Order(torch.arange(site.units).flip(0), torch.arange(site.units).float())

    def memory_plan(self, site):
        return MemoryPlan(0, 0)


def broken(**body):
    return type("Broken", (Reversed,), {"__module__": __name__, "__doc__": "Broken.", **body})


def ordering(make):
    return broken(order=lambda self, covariance, weight, site: make(site.units, weight))


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (ordering(lambda n, w: torch.arange(n)), "must return an Order"),
        (ordering(lambda n, w: Order(torch.zeros(n).long(), torch.arange(n))), "every unit from 0"),
        (ordering(lambda n, w: Order(torch.arange(n).int(), torch.arange(n))), "as int64"),
        (ordering(lambda n, w: Order(torch.arange(n - 1), torch.arange(n))), "units as a tensor"),
        (ordering(lambda n, w: Order(torch.arange(n), -torch.arange(n).float())), "negative or decreases"),
        (ordering(lambda n, w: Order(torch.arange(n), torch.full((n,), torch.nan))), "NaN or infinity"),
        (ordering(lambda n, w: Order(torch.randperm(n), torch.arange(n))), "differently"),
        (ordering(lambda n, w: Order(torch.arange(n), w.zero_()[0, :1].expand(n).clone())), "changes the weight"),
        (broken(memory_plan=lambda self, site: MemoryPlan(0.5, 0)), "an int of 0 or more"),
        (broken(memory_plan=lambda self, site: 5), "must return a MemoryPlan"),
        (broken(order=lambda self, covariance, weight: None), "must have def order(self, covariance, weight, site)"),
    ],
)
def test_each_broken_rule_of_choosers_is_named(component, message):
    check_component(Reversed)
    with pytest.raises(AssertionError) as error:
        check_component(component)
    assert message in str(error.value)


PLUGIN = '''
from typing import Literal
import torch
from prunekit.registry import Chooser, MemoryPlan, Order, hookimpl

class Outside(Chooser):
    """The last unit goes first."""
    name: Literal["outside"] = "outside"
    def order(self, covariance, weight, site):
        return Order(torch.arange(site.units).flip(0), torch.arange(site.units).float())
    def memory_plan(self, site):
        return MemoryPlan(0, 0)

@hookimpl
def scorers():
    return [Outside]
'''


def test_a_chooser_from_outside_serves_a_strategy_of_ours(make_model, batches, tmp_path):
    (tmp_path / "outside.py").write_text(PLUGIN)
    catalog = Catalog.discover(files=[tmp_path / "outside.py"], block="")
    with prune(
        make_model("llama-gqa"), "wanda_sp", ratio=0.5, calibration=batches, scorer="outside", catalog=catalog
    ) as p:
        assert p.sites_kept[0, "attention"] == (0, 1) and p.sites_kept[1, "mlp"] == tuple(range(96))


def test_choosers_decide_once(make_model, batches):
    with pytest.raises(SpecError, match=r"chooses units once.*set selector and merger to null"):
        prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=batches, scorer="obs")


def test_nan_names_the_site(make_model, batches):
    model = make_model("llama-gqa")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 1 mlp"):
        prune(model, "obs", ratio=0.4, calibration=batches)


@pytest.mark.parametrize("options", [{}, {"sequential": False}, {"compensate": {"target": "dense_outputs"}}])
def test_obs_prunes(make_model, batches, options):
    model = make_model("llama-gqa")
    dense = model(**batches[0]).logits
    errors = []
    for use, more in (("obs", options), ("wanda_sp", {})):
        with prune(model, use, ratio=0.4, calibration=batches, **more) as pruned:
            errors.append((model(**batches[0]).logits - dense).square().mean())
            assert pruned.counts[0, "mlp"] < 192
    assert errors[0] < errors[1]
    assert torch.equal(model(**batches[0]).logits, dense)


@pytest.mark.parametrize("allocator", ["global_adaptive", "uniform"])
def test_the_covariance_is_gathered_once(make_model, batches, allocator):
    labels = []

    def progress(items, label, total):
        labels.append(label)
        return items

    options = dict(ratio=0.4, calibration=batches, sequential=False, allocator=allocator, progress=progress)
    with prune(make_model("llama-gqa"), "obs", **options) as pruned:
        assert labels == ["calibrating", "covariances"]
        assert all(cut.compensation.moments is None for cut in pruned._engine.cuts)
        assert any("fewer than 2 for each channel" in note for note in pruned.notes) is False
    with prune(make_model("llama-gqa"), "obs", ratio=0.4, calibration=batches[:1], compensate=None) as pruned:
        assert any(note.startswith("scorer obs: the covariance was computed from 96 tokens") for note in pruned.notes)


def test_cuts_of_more_are_within_those_of_less(make_model, batches):
    kept = []
    for ratio in (0.25, 0.5):
        with prune(make_model("llama-gqa"), "obs", ratio=ratio, calibration=batches, sequential=False) as pruned:
            kept.append(pruned.sites_kept)
    assert all(set(kept[1][place]) <= set(kept[0][place]) for place in kept[0])


def inputs_of(model, consumer, batches):
    """What enters a linear layer, all tokens, float64."""
    seen = []
    handle = model.get_submodule(consumer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


def refitted(module, x, target_x, kept, ridge):
    """Hook that computes a linear layer from its kept inputs, by ridge regression of the target's outputs."""
    weight, mean, target_mean = module.weight.double(), x.mean(0), target_x.mean(0)
    centred = x - mean
    second, cross = centred.T @ centred / len(x), centred.T @ (target_x - target_mean) / len(x)
    added = ridge * second.diagonal().mean() * torch.eye(len(second)).double()
    solved = torch.linalg.solve((second + added)[kept][:, kept], (cross + added)[kept] @ weight.T)
    bias = weight @ target_mean - solved.T @ mean[kept]
    return lambda module, args, output: (args[0][..., kept].double() @ solved + bias).float()


@pytest.mark.parametrize("target", ["dense_weights", "dense_outputs"])
def test_sequential_obs_is_what_a_slow_implementation_gives(make_model, batches, target):
    model, slow = make_model("llama-gqa"), make_model("llama-gqa")
    options = dict(compensate={"ridge": 0.01, "target": target}, scorer={"ridge": 0.01, "rounds": 8})
    with prune(model, "obs", ratio=0.4, calibration=batches, **options) as pruned, torch.no_grad():
        for layer in range(3):
            sites = [site for site in pruned.sites if site.layer == layer]
            with pruned.dense():
                dense = [inputs_of(model, site.consumer, batches) for site in sites]
            inputs = [inputs_of(slow, site.consumer, batches) for site in sites]
            for site, x, dense_x in zip(sites, inputs, dense, strict=True):
                module, aim = slow.get_submodule(site.consumer), dense_x if target == "dense_outputs" else x
                kept = site.columns(torch.tensor(pruned.sites_kept[layer, site.kind]))
                centred, known = x - x.mean(0), covariance_of(x.float())
                if target == "dense_outputs":
                    known.cross = ((dense_x - dense_x.mean(0)).T @ centred / len(x)).float()
                order = ObsChooser(ridge=0.01, rounds=8).order(known, module.weight.float(), site)
                expected = order.units[site.units - pruned.counts[layer, site.kind] :].sort().values
                assert expected.tolist() == list(pruned.sites_kept[layer, site.kind])
                if len(kept) < site.channels:
                    module.register_forward_hook(refitted(module, x, aim, kept, 0.01))
        torch.testing.assert_close(model(**batches[0]).logits, slow(**batches[0]).logits, rtol=1e-2, atol=1e-2)
