"""A ridge and a share of the slope that are chosen on text which the slope was not fitted on."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ChannelMoments, DataError, SiteCovariance, SpecError, complement
from prunekit.registry.tensors.moments import PartedMoments, merged
from prunekit.strategies.compensation import LeastSquares, LowRankLeastSquares
from prunekit.strategies.compensation.held_out import RIDGES, best_held_out

CPU = torch.device("cpu")
C, O, KEPT = 12, 6, torch.arange(7)  # noqa: E741


def moments_of(x):
    found = ChannelMoments(x.shape[-1], CPU)
    found.observe(x[None], None)
    return found


def tokens(count, seed=0, slope=None, noise=1.0):
    """Kept channels that are independent, and dropped ones: ``slope`` (d, k) of them, and noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, C, generator=generator)
    dropped = complement(KEPT, C)
    x[:, dropped] *= noise
    if slope is not None:
        x[:, dropped] += x[:, KEPT] @ slope.T
    return x


def some_slope(seed=5):
    return torch.randn(C - len(KEPT), len(KEPT), generator=torch.Generator().manual_seed(seed))


def weight():
    return torch.randn(O, C, generator=torch.Generator().manual_seed(9))


def by_hand(parts, ridge, share):
    """The squared error of the output over all tokens, each part predicted by the others."""
    dropped, error = complement(KEPT, C), 0.0
    for number, part in enumerate(parts):
        others = torch.cat([*parts[:number], *parts[number + 1 :]]).double()
        mean, part = others.mean(0), part.double()
        covariance = (others - mean).T @ (others - mean) / len(others)
        damped = covariance[KEPT][:, KEPT] + ridge * covariance.diagonal().mean() * torch.eye(len(KEPT))
        slope = torch.linalg.solve(damped, covariance[KEPT][:, dropped]).T
        x = part - mean
        error += ((x[:, dropped] - share * x[:, KEPT] @ slope.T) @ weight()[:, dropped].double().T).square().sum()
    return float(error)


@pytest.mark.parametrize("count, noise", [(8, 2.0), (40, 1.0)])
def test_nothing_on_a_grid_is_better(count, noise):
    parts = [tokens(count, seed, some_slope() / 3, noise) for seed in range(3)]
    ridge, share = best_held_out([moments_of(x) for x in parts], weight(), KEPT)
    found = by_hand(parts, ridge, share)
    tried = [by_hand(parts, other, number / 20) for other in RIDGES for number in range(21)]
    assert found <= min(tried) * (1 + 1e-5)
    assert found < by_hand(parts, RIDGES[0], 1.0) * 0.999 and share > 0


def test_many_tokens_need_no_ridge_and_the_whole_slope():
    parts = [moments_of(tokens(4000, seed, some_slope(), noise=0.1)) for seed in range(2)]
    ridge, share = best_held_out(parts, weight(), KEPT)
    assert ridge < 0.01 and share > 0.99


def test_few_tokens_need_a_heavy_ridge_or_a_small_share():
    parts = [moments_of(tokens(6, seed, some_slope() / 4, noise=1.0)) for seed in range(2)]
    ridge, share = best_held_out(parts, weight(), KEPT)
    assert share / (1 + ridge) < 0.6


def test_parts_that_contradict_each_other_get_no_slope():
    parts = [moments_of(tokens(500, seed, some_slope() * sign, noise=0.1)) for seed, sign in ((0, 1), (1, -1))]
    assert best_held_out(parts, weight(), KEPT)[1] == 0


def test_the_step_between_the_means_of_parts_counts():
    """The slope predicts every part about its own mean, but not where the mean of the kept channels moves to."""
    parts = [tokens(200, seed, some_slope(), noise=0.1) for seed in range(2)]
    parts[1][:, KEPT] += 3
    ridge, share = best_held_out([moments_of(x) for x in parts], weight(), KEPT)
    tried = [by_hand(parts, other, number / 20) for other in RIDGES for number in range(21)]
    assert by_hand(parts, ridge, share) <= min(tried) * (1 + 1e-5)
    assert by_hand(parts, ridge, share) < 0.7 * by_hand(parts, RIDGES[0], 1.0)


def test_a_given_ridge_stays():
    parts = [moments_of(tokens(6, seed, some_slope())) for seed in range(2)]
    assert best_held_out(parts, weight(), KEPT, [0.5])[0] == 0.5


# The covariances of parts.


@pytest.mark.parametrize("rows", [[8], [3, 5], [1] * 8, [2, 1, 4, 1]])
def test_rows_are_divided_in_order_however_they_are_batched(rows):
    x = torch.randn(8, 5, C, generator=torch.Generator().manual_seed(1))
    valid = torch.rand(8, 5, generator=torch.Generator().manual_seed(2)) > 0.3
    parted = PartedMoments([ChannelMoments(C, CPU) for _ in range(3)], rows=8)
    for part, real in zip(x.split(rows), valid.split(rows), strict=True):
        parted.observe(part, real)
    for part, (start, end) in zip(parted.parts, [(0, 2), (2, 5), (5, 8)], strict=True):
        expected = moments_of(x[start:end][valid[start:end]])
        assert part.tokens == expected.tokens
        torch.testing.assert_close(part.products, expected.products)
    whole, before = moments_of(x[valid]), parted.parts[0].products.clone()
    together = merged(parted.parts)
    torch.testing.assert_close(together.mean, whole.mean)
    torch.testing.assert_close(together.products, whole.products)
    assert torch.equal(parted.parts[0].products, before)


# On a model.


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


HELD_OUT = {"name": "least_squares", "held_out": 2}


@pytest.mark.parametrize("compensator", ["least_squares", "low_rank_least_squares"])
@pytest.mark.parametrize("strategy, options", [("wanda_sp", {}), ("wanda_sp", {"sequential": True}), ("pp", {})])
def test_the_slope_is_that_of_the_chosen_ridge_times_the_share(make_model, batches, compensator, strategy, options):
    model, slopes = make_model("llama-gqa"), []
    compensate = {"name": compensator, "held_out": 2}
    for _ in range(2):
        with prune(model, strategy, ratio=0.4, calibration=batches, compensate=compensate, **options) as pruned:
            cut = pruned._engine.cuts[0]
            kept = cut.site.columns(pruned._engine.decider.calibrated_units(cut))
            slopes.append(cut.compensation.folded(cut.binding.consumer.weight, kept))
            chosen = [here.compensation.diagnostics for here in pruned._engine.cuts]
        if "held_out" in compensate:
            assert all(0 <= one["share"] <= 1 and one["ridge"] in RIDGES for one in chosen)
            assert 0 < chosen[0]["share"] < 1
            compensate = {"name": compensator, "ridge": chosen[0]["ridge"]}
            slopes[0] /= chosen[0]["share"]
    torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)


def test_repeated_text_is_trusted_more_than_text_that_differs(make_model, batches):
    model, found = make_model("llama-gqa"), []
    for calibration in (batches[:1] * 2, batches[:2]):
        with prune(model, "wanda_sp", ratio=0.4, calibration=calibration, compensate=HELD_OUT) as pruned:
            found.append([cut.compensation.diagnostics["share"] for cut in pruned._engine.cuts])
    assert min(found[0]) > 0.9
    assert all(same > differs for same, differs in zip(*found, strict=True))


def test_covariances_of_parts_are_released(make_model, batches):
    with prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=batches, compensate=HELD_OUT) as pruned:
        for cut in pruned._engine.cuts:
            assert cut.compensation.moments is None
            assert cut.compensation.bytes < 1.3 * 4 * cut.site.channels**2


def test_memory_has_room_for_every_part():
    plain, parted = (LeastSquares(held_out=number).memory_plan(100, 40, False) for number in (0, 2))
    assert parted.working >= plain.working + 4 * 100 * 100 and parted.held == plain.held
    assert LeastSquares(held_out=5).covariance_parts == 5 and LeastSquares().covariance_parts == 1


def test_what_cannot_be_held_out_is_refused(make_model, batches):
    model = make_model("llama-gqa")
    with pytest.raises(DataError, match=r"16 rows cannot be divided into 17 parts.*held_out"):
        prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate=HELD_OUT | {"held_out": 17})
    with pytest.raises(SpecError, match="at least 2"):
        prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate=HELD_OUT | {"held_out": 1})


@pytest.mark.parametrize("kind", [LeastSquares, LowRankLeastSquares])
@pytest.mark.parametrize(
    "kept, parts, error, said",
    [(KEPT, 1, torch.linalg.LinAlgError, "in one part"), (None, 2, SpecError, "needs calibrated scores")],
)
def test_what_a_component_cannot_choose_from(kind, kept, parts, error, said):
    """Parts of padding alone are not among those it gets."""
    x = moments_of(tokens(50))
    covariance = SiteCovariance(x.products / 50, 50, kept, False, parts=[x] * parts, weight=weight())
    with pytest.raises(error, match=said):
        kind(held_out=2).prepare(covariance)
