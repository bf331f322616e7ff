"""Joint choice: the order of brute force, nested cuts, exact refits, and what is refused by name."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine.choosing import choice_of
from prunekit.registry import (
    Catalog,
    Chooser,
    MemoryPlan,
    ModelError,
    NonFiniteError,
    Order,
    SingularError,
    SiteCovariance,
    SpecError,
)
from prunekit.registry.checks import check_component
from prunekit.registry.checks.parts import some_site
from prunekit.registry.errors import LinAlgError
from prunekit.strategies.modegpt import ModegptChooser
from prunekit.strategies.obs import ObsChooser

from tests.test_compensation_memory import passes, peak_of

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
@pytest.mark.parametrize(("seed", "tokens"), [(0, 300), (1, 300), (2, 15)])
def test_the_order_is_that_of_brute_force(kind, seed, tokens):
    """Also of 15 tokens, whose covariance of 24 channels only the ridge makes solvable."""
    site, weight, known = some_site(kind), draw(20, CHANNELS, seed=seed), covariance_of(sample(tokens, seed))
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


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("rounds", [1, 3, 24])
def test_the_first_order_term_is_that_of_its_formula(kind, rounds):
    """Half the loss plus the product with the dense model's G = H W, by a new inverse in every round."""
    site, dense, known = some_site(kind), draw(20, CHANNELS).T.double(), covariance_of(sample())
    h = (known.matrix + 1e-3 * known.matrix.diagonal().mean() * torch.eye(CHANNELS)).double()
    left, order = list(range(site.units)), []
    for number in range(min(rounds, site.units)):
        channels = site.columns(torch.tensor(left))
        inverse = torch.linalg.inv(h[channels][:, channels])
        values = inverse @ h[channels] @ dense
        scores = []
        for place in range(len(left)):
            g = slice(place * site.unit_size, (place + 1) * site.unit_size)
            second = (values[g] * torch.linalg.solve(inverse[g, g], values[g])).sum()
            scores.append(float(second / 2 + (values[g] * (h @ dense)[channels[g]]).sum()))
        share = site.units * (number + 1) // min(rounds, site.units) - len(order)
        going = sorted(range(len(left)), key=scores.__getitem__)[:share]
        order += [left[place] for place in going]
        left = [unit for place, unit in enumerate(left) if place not in going]
    found = ObsChooser(ridge=1e-3, rounds=rounds, gradient=True).order(known, draw(20, CHANNELS), site)
    assert found.units.tolist() == order
    plain = ObsChooser(ridge=1e-3, rounds=rounds).order(covariance_of(sample()), draw(20, CHANNELS), site)
    assert plain.units.tolist() != order


def test_more_rounds_lose_less():
    site, weight = some_site("mlp"), draw(20, CHANNELS)
    losses = [ObsChooser(rounds=n, ridge=1e-3).order(covariance_of(sample()), weight, site).loss[11] for n in (1, 24)]
    assert losses[1] < losses[0]


def test_scores_are_all_different_and_cuts_are_nested():
    order = Order(torch.tensor([2, 0, 3, 1]), torch.tensor([0.0, 0.0, 0.5, 0.5]))
    scores = order.scores
    assert scores.argsort().tolist() == [2, 0, 3, 1] and len(scores.unique()) == 4


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_modegpt_is_ridge_leverage(kind):
    site, known = some_site(kind), covariance_of(sample())
    second = (known.matrix + torch.outer(known.mean, known.mean)).double() * 300
    leverage = (second @ torch.linalg.inv(second + 0.01 * torch.eye(CHANNELS))).diagonal().view(site.units, -1).sum(1)
    order = ModegptChooser(centred=False, absolute=True).order(known, draw(20, CHANNELS), site)
    assert order.units.tolist() == leverage.argsort().tolist()


def test_a_covariance_that_rounding_makes_indefinite_gets_a_larger_ridge():
    """A channel a thousand times as large as the others, and its copies: float32 loses the others' variances."""
    loud = 1e4 * draw(300, 1, seed=3)
    known = covariance_of(torch.cat([draw(300, CHANNELS - 6), loud + 1e-3 * draw(300, 6, seed=4)], 1))
    assert torch.linalg.eigvalsh(known.matrix.double())[0] < 0
    order = ObsChooser(ridge=1e-12).order(known, draw(20, CHANNELS), some_site("mlp"))
    assert known.diagnostics["ridge"] > 1e-12 and order.flaw(CHANNELS) is None


def test_what_no_ridge_makes_definite_names_the_site():
    known = covariance_of(sample())
    known.matrix.fill_(1).diagonal().fill_(0.01)
    with pytest.raises(SingularError, match=r"layer 0 mlp: scorer obs cannot solve .*raise its ridge, or use another"):
        choice_of(ObsChooser(), some_site("mlp"), known, draw(20, CHANNELS))


class Reversed(Chooser):
    """The last unit goes first."""

    exempt: ClassVar[Mapping[str, str]] = {"check_unit_order": "it orders by number"}
    name: Literal["reversed"] = "reversed"

    def order(self, covariance, weight, site):
        return Order(torch.arange(site.units).flip(0), torch.arange(site.units).float())

    def memory_plan(self, site):
        return MemoryPlan(0, 0)


def broken(**body):
    return type("Broken", (Reversed,), {"__module__": __name__, "__doc__": "Broken.", **body})


def unsolved(self, covariance, weight, site):
    raise LinAlgError("not today")


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
        (broken(memory_plan=lambda self, site: MemoryPlan(0, 0, 0)), "must plan limit as an int of at least 1"),
        (broken(order=unsolved), "cannot solve a covariance that is positive definite"),
        (broken(exempt={}), "orders units by their numbers"),
        (broken(exempt={"check_units": "misspelt"}), "is exempt from 'check_units', which is not a check of its"),
        (broken(order=lambda self, covariance, weight: None), "must have def order(self, covariance, weight, site)"),
    ],
)
def test_each_broken_rule_of_choosers_is_named(component, message):
    check_component(Reversed)
    with pytest.raises(AssertionError) as error:
        check_component(component)
    assert message in str(error.value)


PLUGIN = '''
from collections.abc import Mapping
from typing import ClassVar, Literal
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


@pytest.mark.parametrize(
    "options",
    [{}, {"sequential": False}, *({"compensate": {"target": target}} for target in ("dense_outputs", "dense_stream"))],
)
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


# Memory


SMALL = 1_500_000 / 2**30
"""GiB that hold the covariances of some sites of the tiny models, not of all."""


@pytest.mark.parametrize("compensate", [None, {"name": "least_squares"}, {"name": "least_squares", "held_out": 2}])
def test_orders_made_in_several_passes_are_those_of_one(make_model, batches, compensate):
    model, found = make_model("llama-gqa"), []
    for limit in (None, SMALL):
        labels, progress = passes()
        limits = None if compensate is None else {**compensate, "memory_gib": limit}
        options = dict(scorer={"memory_gib": limit}, compensate=limits, sequential=False, progress=progress)
        with prune(model, "obs", ratio=0.4, calibration=batches, **options) as pruned:
            found.append((pruned.sites_kept, model(**batches[0]).logits))
            assert all(cut.compensation.moments is None for cut in pruned._engine.cuts)
        covariances = [label for label in labels if label.startswith("covariances")]
        if limit is None:
            assert covariances == ["covariances"]
        else:  # they are gathered again for the compensation: those of all sites were not kept
            parts = int(covariances[0].removeprefix("covariances, part 1 of "))
            assert parts > 1 and (len(covariances) > parts) == (compensate is not None)
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-5)


def test_a_site_that_does_not_fit_is_refused_with_its_needs(make_model, batches):
    for sequential in (False, True):
        with pytest.raises(ModelError, match=r"layer 0 attention: scorer obs needs 0.0625 MiB .*memory_gib.*another"):
            options = dict(scorer={"memory_gib": 1e-4}, sequential=sequential)
            prune(make_model("llama-gqa"), "obs", ratio=0.4, calibration=batches, **options)
    with pytest.raises(
        ModelError, match=r"layer 0: sequential calibration gathers .*memory_gib"
    ):  # the MLP's alone fit
        prune(make_model("llama-gqa"), "obs", ratio=0.4, calibration=batches, scorer={"memory_gib": 1.28 / 1024})


def unit_of(size):
    return replace(some_site("mlp"), units=384 // size, unit_size=size, outputs=128)


@pytest.mark.parametrize("size", [1, 64])
@pytest.mark.parametrize("options", [{}, {"rounds": 1}, {"rounds": 2, "gradient": True}, {"gradient": True}])
@pytest.mark.parametrize("cross", [False, True])
def test_what_obs_states_is_no_less_than_it_takes(size, options, cross):
    matrix = torch.cov(draw(384, 600))
    known = SiteCovariance(matrix, 600, None, True, cross=matrix.clone() if cross else None)
    chooser, weight = ObsChooser(**options), draw(128, 384)
    taken = peak_of(lambda: chooser.order(known, weight, unit_of(size)))
    stated = chooser.memory_plan(unit_of(size)).working
    assert taken <= stated < 1.8 * taken


def test_modegpt_takes_one_matrix():
    matrix = torch.cov(draw(384, 600))
    chooser, known = ModegptChooser(ridge=0.1), SiteCovariance(matrix, 600, None, True)
    taken = peak_of(lambda: chooser.order(known, draw(1, 384), unit_of(1)))
    stated = chooser.memory_plan(unit_of(1)).working
    assert stated == 8 * 384 * 384 and taken < 1.05 * stated


# With other parts


ALLOCATORS = {
    "greedy": {"tokens": 96},
    "sensitivity": {"tokens": 96, "levels": [0.4, 1.0]},
    "evolutionary": {"tokens": 96, "generations": 2},
    "explicit": {"attention": [0.5] * 3, "mlp": [0.3] * 3},
    "pp_reference_flap": {"group": 8, "mlp_multiple": 4},
}
"""Options of allocators that need some, or take long without."""


@pytest.mark.parametrize(
    ("allocator", "unit"),
    [(name, "kv_group") for name in Catalog.discover(block="").names("allocators")]
    + [(name, "query_head") for name in ("uniform", "greedy", "global_adaptive", "global_ranking")],
)
def test_every_allocator_works_with_a_chooser(make_model, batches, allocator, unit):
    model, options = make_model("llama-gqa"), {"name": allocator, **ALLOCATORS.get(allocator, {})}
    ratio = None if allocator == "explicit" else 0.4
    asked = dict(ratio=ratio, calibration=batches[:1], allocator=options, attention_unit=unit)
    with prune(model, "obs", **asked) as pruned:
        cut = 0.2 if allocator == "mlp_only" else 0.4
        assert pruned.ratio.units_cut == pytest.approx(cut, abs=0.1)
        assert model(**batches[0]).logits.isfinite().all()
        for cut in pruned._engine.cuts:
            order = cut.state.choice
            if order is not None and not cut.whole:
                highest = order.units.topk(cut.count).indices.sort().values
                assert tuple(highest.tolist()) == pruned.sites_kept[cut.site.layer, cut.site.kind]


def inputs_of(model, module, batches):
    """What enters a module, all tokens, float64."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_orders_as_float32_does(make_model, batches, dtype):
    """Activations beyond 256, whose squares float16 does not hold."""
    found = []
    for precision in (dtype, torch.float32):
        model = make_model("llama-gqa")
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(60)
            layer.mlp.down_proj.weight.div_(60)
        model = model.to(dtype).to(precision)
        with prune(model, "obs", ratio=0.4, calibration=batches, sequential=False) as pruned:
            assert model(**batches[0]).logits.isfinite().all()
            choices = [cut.state.choice for cut in pruned._engine.cuts]
            assert all(choice.units.dtype == torch.float32 for choice in choices)
            found.append((choices, pruned.sites_kept))
            loudest = max(float(inputs_of(model, f"model.layers.{n}.mlp.down_proj", batches).max()) for n in range(3))
    assert loudest > 256
    (half, kept), (full, expected) = found
    for one, other in zip(half, full, strict=True):
        ranks = [choice.units.argsort().argsort().double() for choice in (one, other)]
        assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.98
    assert all(len(set(kept[place]) & set(expected[place])) > 0.95 * len(kept[place]) for place in kept)


def test_fewer_tokens_than_channels_are_noted_and_solved(make_model, batches):
    model, few = make_model("llama-gqa"), [{"input_ids": batches[0]["input_ids"][:2]}]
    for options in ({}, {"scorer": {"ridge": 1e-6}}):
        with prune(model, "obs", ratio=0.4, calibration=few, **options) as pruned:
            assert model(**batches[0]).logits.isfinite().all()
            assert any("computed from 48 tokens, fewer than 2 for each channel" in note for note in pruned.notes)


def test_cuts_of_more_are_within_those_of_less(make_model, batches):
    kept = []
    for ratio in (0.25, 0.5):
        with prune(make_model("llama-gqa"), "obs", ratio=ratio, calibration=batches, sequential=False) as pruned:
            kept.append(pruned.sites_kept)
    assert all(set(kept[1][place]) <= set(kept[0][place]) for place in kept[0])
