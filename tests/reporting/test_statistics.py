"""Intervals: equal to scipy's, and as long as they claim, for many windows and for few."""

import math

import numpy as np
import pytest
from prunekit.compress.reporting.statistics import mean_interval, paired_bootstrap, ratio_interval, t_reach
from scipy import stats


def windows(losses, tokens):
    return np.array([losses, tokens], dtype=float)


def pair(count, seed=0, noise=0.02, more=0.0, last=128.0):
    """Windows of two models with the same true loss, or ``more`` for the second; the last may be shorter."""
    generator = np.random.default_rng(seed)
    tokens = np.array([128.0] * (count - 1) + [last])
    hard = generator.normal(3, 0.3, count)
    return [windows(tokens * (hard + extra + generator.normal(0, noise, count)), tokens) for extra in (0.0, more)]


@pytest.mark.parametrize("count", [3, 20, 22, 60, 200])
def test_the_mean_of_paired_differences_has_scipys_interval(count):
    values = np.random.default_rng(count).normal(1, 2, count)
    low, high = mean_interval(values)
    expected = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    one = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((one.low, one.high))


def test_students_t_has_the_values_of_the_tables():
    assert [round(t_reach(n), 3) for n in (1, 2, 20, 60, 199)] == [12.706, 4.303, 2.086, 2.0, 1.972]
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0)
    low, high = mean_interval([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])  # a column for each difference
    reach = 4.3026527 / math.sqrt(3)
    assert low == pytest.approx([2 - reach, 5]) and high == pytest.approx([2 + reach, 5])


def test_the_bootstrap_agrees_with_scipys():
    a, b = pair(40, more=0.05, last=60.0)
    difference, ratio = paired_bootstrap(a, b, 4000, 1)

    def statistic(first, second, tokens, axis):
        return np.exp((second.sum(axis) - first.sum(axis)) / tokens.sum(axis))

    found = stats.bootstrap(
        (a[0], b[0], a[1]), statistic, paired=True, method="percentile", n_resamples=4000, random_state=2
    ).confidence_interval
    assert (ratio.low - 1, ratio.high - 1) == pytest.approx((found.low - 1, found.high - 1), rel=0.05)
    assert ratio.value == pytest.approx(statistic(a[0], b[0], a[1], 0))
    assert difference.value == pytest.approx(math.exp(b[0].sum() / b[1].sum()) - math.exp(a[0].sum() / a[1].sum()))
    assert difference.low < difference.value < difference.high


def test_the_bootstrap_covers_95_percent():
    a, b = pair(400)
    _, ratio = paired_bootstrap(a, b, 4000, 1)
    reach = 1.96 * ((b[0] - a[0]) / 128).std(ddof=1) / 20  # of a normal distribution, for so many windows
    assert math.log(ratio.high / ratio.low) == pytest.approx(2 * reach, rel=0.06)  # 90% would be 16% shorter


def test_pairing_makes_the_interval_short():
    a, b = pair(40, more=0.05)
    paired, unpaired = (paired_bootstrap(a, side, 500, 1)[1] for side in (b, np.array([b[0][::-1], b[1]])))
    assert paired.low > 1 > unpaired.low


def test_the_same_seed_gives_the_same_interval_and_equal_runs_have_no_difference():
    a, b = pair(30)
    assert paired_bootstrap(a, b, 1000, 7) == paired_bootstrap(a, b, 1000, 7) != paired_bootstrap(a, b, 1000, 8)
    difference, ratio = paired_bootstrap(a, a, 1000, 7)
    assert difference == (0, 0, 0) and ratio == (1, 1, 1)


def test_few_windows_get_students_interval():
    a = windows((30.0, 30.0, 30.0), (10.0, 10.0, 10.0))
    b = windows((31.0, 32.0, 33.0), (10.0, 10.0, 10.0))  # 0.1, 0.2 and 0.3 nats more per token
    reach = 4.3026527 * 0.1 / math.sqrt(3)
    assert ratio_interval(a, b) == pytest.approx((math.exp(0.2 - reach), math.exp(0.2 + reach)))
    assert ratio_interval(*pair(20)) == paired_bootstrap(*pair(20), 2000)[1][1:]


@pytest.mark.parametrize(
    ("count", "last"), [(2, 128.0), (2, 127.0), (3, 128.0), (3, 40.0), (5, 128.0), (5, 40.0), (8, 128.0), (12, 40.0)]
)
def test_few_windows_of_equal_models_are_seldom_different(count, last):
    different = 0
    for seed in range(400):
        low, high = ratio_interval(*pair(count, seed, last=last))
        different += low > 1 or high < 1
    assert 0.01 < different / 400 < 0.09


def test_a_large_difference_shows_in_few_windows():
    low, high = ratio_interval(*pair(5, more=0.2))
    assert 1.1 < low < math.exp(0.2) < high


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (((3.0,), (1.0,)), ((3.0,), (1.0,))),  # one window
        (((3.0, 3.0), (1.0, 1.0)), ((3.0, 3.0), (1.0, 2.0))),  # other tokens
        (((3.0, 3.0), (1.0, 1.0)), ((3.0, 3.0, 3.0), (1.0, 1.0, 1.0))),  # more windows
        (((3.0, 1.0), (3.0, 1.0)), ((3.0, 1.0), (3.0, 1.0))),  # hardly more than one window
        (((3.0, 3.0), (1.0, 1.0)), ((900.0, 9000.0), (1.0, 1.0))),  # too large for a float
    ],
)
def test_what_has_no_interval_has_none(a, b):
    assert ratio_interval(windows(*a), windows(*b)) is None


def test_no_windows_or_overflowing_perplexities_have_no_bootstrap():
    for count in (0, 1):
        side = windows([3.0] * count, [10.0] * count)
        assert paired_bootstrap(side, side, 100) is None
    assert paired_bootstrap(windows([8000, 8000], [10, 10]), windows([30, 30], [10, 10]), 100) is None
