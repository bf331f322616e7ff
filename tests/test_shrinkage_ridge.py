"""The ridge that least squares chooses itself: as large as few tokens ask for."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import SiteCovariance
from prunekit.strategies.compensation.least_squares import DEPENDENCE, LeastSquares, shrinkage_ridge
from prunekit.strategies.compensation.low_rank import LowRankLeastSquares

C = 40


def true_covariance():
    mixing = torch.randn(C, C, generator=torch.Generator().manual_seed(3)) * torch.linspace(2, 0.05, C)
    return mixing @ mixing.T


def sampled(count, seed=0):
    x = (
        torch.randn(count, C, generator=torch.Generator().manual_seed(seed))
        @ torch.linalg.cholesky(true_covariance() + 1e-4 * torch.eye(C)).T
    )
    return x.T @ x / count


def shrunk(covariance, ridge):
    weight = ridge / (1 + ridge)
    return (1 - weight) * covariance + weight * covariance.diagonal().mean() * torch.eye(C)


@pytest.mark.parametrize("count", [10, 40, 200])
def test_it_is_near_the_best_shrinkage_there_is(count):
    covariances = [sampled(count, seed) for seed in range(10)]

    def error(ridge_of):
        return sum((shrunk(s, ridge_of(s)) - true_covariance()).square().sum() for s in covariances)

    best = min(error(lambda s, r=r: r) for r in torch.logspace(-4, 2, 60).tolist())
    assert error(lambda s: shrinkage_ridge(s, count)) < 1.1 * best < 1.1 * error(lambda s: 0.0)


def test_fewer_samples_ask_for_more_and_the_scale_for_nothing():
    covariance = sampled(100)
    ridges = [shrinkage_ridge(covariance, count) for count in (5, 50, 500, 5000)]
    assert ridges == sorted(ridges, reverse=True) and ridges[0] > 20 * ridges[-1] > 0
    assert shrinkage_ridge(1e4 * covariance, 50) == pytest.approx(ridges[1], rel=1e-4)
    assert shrinkage_ridge(torch.eye(C), 50) > 1000, "nothing but noise: all channels are alike"
    assert 0 < shrinkage_ridge(covariance, 1e12) < 1e-3


@pytest.mark.parametrize("method", [LeastSquares, LowRankLeastSquares])
def test_a_ridge_of_the_user_stays(method):
    covariance = sampled(20)

    def ridge(**options):
        here = SiteCovariance(covariance.clone(), 20, None, once=True)
        method(**options).prepare(here)
        return here.diagnostics["ridge"]

    assert ridge(ridge=0.3) == 0.3 and ridge() == shrinkage_ridge(covariance, 20 / DEPENDENCE)


@pytest.mark.parametrize("use", ["wanda_sp", "pp"])
def test_a_run_takes_the_ridge_of_its_tokens_and_says_so(make_model, batches, use):
    ridges = []
    for text in (batches[:1], batches[:3]):
        options = dict(ratio=0.4, calibration=text, compensate="least_squares")
        with prune(make_model("llama-gqa"), use, **options) as pruned:
            here = [cut.compensation for cut in pruned._engine.cuts]
            assert all(c.diagnostics["ridge"] for c in here) and len({c.diagnostics["ridge"] for c in here}) > 1
            ridge = pruned.about_compensation()["ridge"]
            assert (
                "a ridge of " in pruned.notes[-1] and f" to {ridge['largest']:.3g} times the mean" in pruned.notes[-1]
            )
            assert pruned.strategy.compensate.ridge is None
            ridges.append([c.diagnostics["ridge"] for c in here])
    assert all(few > more for few, more in zip(*ridges, strict=True)), "more text wants smaller ridges"
