"""Slopes against float64, and against each other: solved, pivoted, and of low rank."""

import pytest
import torch
from prunekit.registry import SiteCovariance, SpecError, complement
from prunekit.strategies.compensation import LeastSquares, LowRankLeastSquares, Mean, ProbeMean
from prunekit.strategies.compensation.low_rank import leading_eigenpairs
from prunekit.strategies.compensation.pivot import pivot, regression_on

C = 40
EVERYTHING = torch.arange(C)
RIDGE = 0.01
METHODS = [
    LeastSquares(ridge=RIDGE),
    LeastSquares(per_batch="solve", ridge=RIDGE),
    LowRankLeastSquares(rank=4, ridge=RIDGE),
]


def covariance_of(seed=0, factors=12, scale=1.0):
    """A covariance (C, C) float32 of channels that share a few factors and differ in variance."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(C, factors, generator=generator) * torch.linspace(0.2, 3, C)[:, None]
    tokens = torch.randn(300, factors, generator=generator) @ loadings.T
    tokens += 0.3 * torch.randn(300, C, generator=generator)
    return tokens.T.cov(correction=0) * scale


def cut_of(count, seed=0):
    """Kept (count,) and dropped channels, drawn at random."""
    kept = torch.randperm(C, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return kept, complement(kept, C)


def reference(covariance, kept, dropped, ridge=RIDGE):
    """The ridge regression of dropped on kept channels in float64; (C, C) -> (d, k)."""
    ridged = covariance.double()
    ridged = ridged + ridge * ridged.diagonal().mean() * torch.eye(C, dtype=torch.float64)
    return ridged[dropped][:, kept] @ torch.linalg.inv(ridged[kept][:, kept])


def of(matrix, kept=None, once=False):
    """A covariance as compensators get it, of so many tokens that they need not count."""
    return SiteCovariance(matrix, 10**6, kept, once)


def solved(method, covariance, kept, dropped):
    """The slope of a cut that is made once."""
    return method.slope(method.prepare(of(covariance, kept, once=True)), kept, dropped)


def product(slope):
    """A slope's matrices multiplied."""
    return slope[0] if len(slope) == 1 else torch.linalg.multi_dot(slope)


def close(found, wanted, tolerance=2e-4):
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


@pytest.mark.parametrize("ridge", [1e-3, 0.01, 1.0])
@pytest.mark.parametrize("count", [1, 13, 24, C - 1])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_solve_is_the_ridge_regression(count, ridge, scale):
    kept, dropped = cut_of(count)
    covariance = covariance_of(scale=scale)
    wanted = reference(covariance, kept, dropped, ridge)
    (found,) = solved(LeastSquares(ridge=ridge), covariance, kept, dropped)
    close(found, wanted)


def bases(kept, dropped):
    """Channels to pivot on: of every kind that a batch's cut may find."""
    half = len(kept) // 2
    return {
        "all": EVERYTHING,
        "kept": kept,
        "some": torch.cat([kept[:half], dropped[: len(kept) - half]]).sort().values,
        "disjoint": dropped[: len(kept)],
        "one more": torch.cat([kept, dropped[:1]]).sort().values,
    }


@pytest.mark.parametrize("base", ["all", "kept", "some", "disjoint", "one more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regressions_from_one_pivot_are_the_direct_ones(base, dtype):
    for seed, count in enumerate((1, 7, 16, 20)):
        kept, dropped = cut_of(count, seed)
        on = bases(kept, dropped)[base]
        matrix = covariance_of(seed).to(dtype)
        matrix += 0.01 * matrix.diagonal().mean() * torch.eye(C)
        wanted = matrix.double()[dropped][:, kept] @ torch.linalg.inv(matrix.double()[kept][:, kept])
        in_base = torch.zeros(C, dtype=torch.bool).index_fill_(0, on, True)
        found = regression_on(kept, dropped, pivot(matrix, on), in_base)
        assert found.shape == (C - count, count) and found.dtype == dtype
        tolerance = 1e-3 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


def test_a_pivot_has_inverse_regression_and_rest():
    base, others = cut_of(15)
    matrix = covariance_of().double() + torch.eye(C)
    pivoted = pivot(matrix, base)
    inverse, across = torch.linalg.inv(matrix[base][:, base]), matrix[base][:, others]
    torch.testing.assert_close(pivoted[base][:, base], inverse)
    torch.testing.assert_close(pivoted[base][:, others], -inverse @ across)
    torch.testing.assert_close(pivoted[others][:, base], across.T @ inverse)
    torch.testing.assert_close(pivoted[others][:, others], matrix[others][:, others] - across.T @ inverse @ across)
    torch.testing.assert_close(pivot(matrix, EVERYTHING), torch.linalg.inv(matrix))


def test_without_correction_it_is_the_usual_cuts_regression_where_its_channels_are_kept():
    usual, left = cut_of(20)
    covariance = covariance_of()
    whole = reference(covariance, usual, left)
    method = LeastSquares(per_batch="usual", ridge=RIDGE)
    prepared = method.prepare(of(covariance.clone(), usual))
    close(method.slope(prepared, usual, left)[0], whole)
    kept = torch.cat([usual[:15], left[:5]]).sort().values
    dropped = complement(kept, C)
    (found,) = method.slope(prepared, kept, dropped)
    wanted = torch.zeros(C, C, dtype=torch.float64)
    wanted[left[:, None], usual] = whole
    close(found, wanted[dropped][:, kept])
    exact = reference(covariance, kept, dropped)
    assert (found - exact).abs().max() > 0.05, "the correction must be visible, or the check proves nothing"


@pytest.mark.parametrize("usual", [None, cut_of(20, seed=3)[0]], ids=["none", "usual"])
def test_pivot_solve_and_a_cut_made_once_agree(usual):
    kept, dropped = cut_of(20)
    covariance = covariance_of()
    wanted = reference(covariance, kept, dropped)
    for method in (
        LeastSquares(per_batch="pivot", ridge=RIDGE),
        LeastSquares(per_batch="solve", ridge=RIDGE),
        LowRankLeastSquares(rank=C, ridge=RIDGE),
    ):
        prepared = method.prepare(of(covariance.clone(), usual))
        close(product(method.slope(prepared, kept, dropped)), wanted, 1e-3)
        close(product(solved(method, covariance.clone(), kept, dropped)), wanted, 1e-3)


def test_the_usual_cut_must_be_known():
    with pytest.raises(SpecError, match="per_batch usual needs calibrated scores; use pivot"):
        LeastSquares(per_batch="usual", ridge=RIDGE).prepare(of(covariance_of()))


@pytest.mark.parametrize("rank", [1, 5, 12, C, 500])
def test_a_low_rank_slope_is_that_of_its_own_covariance(rank):
    kept, dropped = cut_of(17)
    method = LowRankLeastSquares(rank=rank, ridge=RIDGE)
    factors = method.prepare(of(covariance_of()))
    assert [factor.shape for factor in factors] == [(C, min(rank, C)), (C,)]
    loadings, specific = (factor.double() for factor in factors)
    model = loadings @ loadings.T + specific.diag()
    wanted = model[dropped][:, kept] @ torch.linalg.inv(model[kept][:, kept])
    slope = method.slope(factors, kept, dropped)
    assert [factor.shape for factor in slope] == [(C - 17, min(rank, C)), (min(rank, C), 17)]
    close(product(slope), wanted, 1e-3)
    # All variances are those of the covariance, the ridge on top.
    covariance = covariance_of()
    variance = covariance.diagonal() + 0.01 * covariance.diagonal().mean()
    torch.testing.assert_close(model.diagonal().float(), variance, rtol=1e-3, atol=1e-4)


def test_more_factors_explain_more():
    kept, dropped = cut_of(17)
    wanted = reference(covariance_of(), kept, dropped)
    errors = []
    for rank in (1, 6, 12, C):
        slope = solved(LowRankLeastSquares(rank=rank, ridge=RIDGE), covariance_of(), kept, dropped)
        errors.append(float((product(slope) - wanted).norm() / wanted.norm()))
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.3 > 0.01 > errors[-1]


def test_leading_eigenpairs():
    basis = torch.linalg.qr(torch.randn(C, C, generator=torch.Generator().manual_seed(2))).Q
    matrix = (basis * 1.5 ** -torch.arange(C)) @ basis.T
    matrix = (matrix + matrix.T) / 2
    vectors, values = leading_eigenpairs(matrix, 6, seed=0)
    right_values, right = torch.linalg.eigh(matrix)
    assert vectors.shape == (C, 6) and values.shape == (6,)
    torch.testing.assert_close(values, right_values[-6:], rtol=1e-3, atol=0)
    torch.testing.assert_close((vectors * right[:, -6:]).sum(0).abs(), torch.ones(6), rtol=0, atol=1e-3)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(6), rtol=0, atol=1e-5)


def test_the_search_draws_from_its_own_seed():
    matrix = covariance_of()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = leading_eigenpairs(matrix, 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = leading_eigenpairs(matrix, 3, seed=5), leading_eigenpairs(matrix, 3, seed=6)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1], other[1], rtol=1e-3, atol=0)
    assert isinstance(LowRankLeastSquares(seed=5).prepare(of(matrix)), tuple)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{getattr(method, 'per_batch', '')}")
def test_fewer_tokens_than_channels_need_the_ridge_and_constant_channels_cannot_be_solved(method):
    kept, dropped = cut_of(30)
    few = torch.randn(10, C, generator=torch.Generator().manual_seed(0)).T.cov(correction=0)
    assert product(solved(method, few.clone(), kept, dropped)).isfinite().all()
    assert product(method.slope(method.prepare(of(few.clone())), kept, dropped)).isfinite().all()
    with pytest.raises(torch.linalg.LinAlgError):
        solved(method, torch.zeros(C, C), kept, dropped)
    with pytest.raises(torch.linalg.LinAlgError):
        method.slope(method.prepare(of(torch.zeros(C, C))), kept, dropped)


def test_the_mean_is_calibrated_or_partly_the_probes():
    calibrated, probe = torch.tensor([0.0, 4.0]), torch.tensor([2.0, 0.0])
    assert torch.equal(Mean().mean(calibrated, None), calibrated)
    assert torch.equal(LeastSquares().mean(calibrated, None), calibrated)
    for method in (ProbeMean(probe=0.25), LeastSquares(probe=0.25), LowRankLeastSquares(probe=0.25)):
        assert method.uses_probe and method.selector is not None
        assert method.mean(calibrated, probe).tolist() == [0.5, 3.0]
