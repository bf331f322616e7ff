"""Intervals: as long as they say, for many windows and for few."""

import math

import numpy as np
import pytest
from prunekit.compress.reporting.bootstrap import Windows, mean_interval, paired_interval, ratio_interval, student


def pair(count, seed=0, noise=0.02, more=0.0, last=128.0):
    """Windows of two models with the same true loss, or ``more`` for the second; the last may be shorter."""
    generator = np.random.default_rng(seed)
    tokens = np.array([128.0] * (count - 1) + [last])
    hard = generator.normal(3, 0.3, count)
    sides = [tokens * (hard + extra + generator.normal(0, noise, count)) for extra in (0.0, more)]
    return [Windows(tuple(side.tolist()), tuple(tokens.tolist())) for side in sides]


def test_the_bootstrap_covers_95_percent():
    a, b = pair(400)
    found = paired_interval(a, b, 4000, 1)
    differences = (np.array(b.losses) - a.losses) / 128
    reach = 1.96 * differences.std(ddof=1) / 20  # what a normal distribution gives for so many windows
    assert math.log(found.ratio_high / found.ratio_low) == pytest.approx(2 * reach, rel=0.06)  # 90% would lack 16%


def test_few_windows_get_students_interval():
    a = Windows((30.0, 30.0, 30.0), (10.0, 10.0, 10.0))
    b = Windows((31.0, 32.0, 33.0), (10.0, 10.0, 10.0))  # 0.1, 0.2 and 0.3 nats more per token
    reach = 4.303 * 0.1 / math.sqrt(3)
    assert ratio_interval(a, b, 100) == pytest.approx((math.exp(0.2 - reach), math.exp(0.2 + reach)))
    whole = paired_interval(*pair(20), 500)
    assert ratio_interval(*pair(20), 500) == (whole.ratio_low, whole.ratio_high)


@pytest.mark.parametrize(
    ("count", "last"), [(2, 128.0), (2, 127.0), (3, 128.0), (3, 40.0), (5, 128.0), (5, 40.0), (8, 128.0), (12, 40.0)]
)
def test_few_windows_of_equal_models_are_seldom_told_apart(count, last):
    told = 0
    for seed in range(400):
        low, high = ratio_interval(*pair(count, seed, last=last), 100)
        told += low > 1 or high < 1
    assert 0.01 < told / 400 < 0.09  # percentiles of a bootstrap: 50% of pairs of two windows, 8% of twelve


def test_a_large_difference_is_told_from_few_windows():
    low, high = ratio_interval(*pair(5, more=0.2), 100)
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
    assert ratio_interval(Windows(*a), Windows(*b), 100) is None


def test_the_mean_of_paired_differences():
    reach = 4.303 * 1.0 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - reach, 2 + reach))
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0)
    assert student(1) == 12.706 and student(20) == student(400) == 2.086
