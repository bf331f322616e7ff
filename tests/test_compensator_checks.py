"""The checks of compensators can fail: each broken rule is named, and what keeps the rules passes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import torch
from prunekit.registry import Compensator, MemoryPlan, SpecError
from prunekit.registry.checks import check_component
from prunekit.registry.checks.compensators import some_covariance
from prunekit.strategies.compensation import LeastSquares, Mean, ProbeMean


def regression(self, covariance, kept, dropped):
    ridged = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
    factor = torch.linalg.cholesky(ridged[kept][:, kept])
    return (torch.cholesky_solve(ridged[kept][:, dropped], factor).T,)


class Good(Compensator):
    """A compensator that keeps all rules; its covariance is written to, which is allowed."""

    needs_covariance: ClassVar[bool] = True
    name: Literal["good"] = "good"

    def prepare(self, covariance):
        return covariance.matrix.mul_(2)

    slope = regression


class Factored(Good):
    """Two matrices; it requires the channels that calibration keeps."""

    name: Literal["factored"] = "factored"

    def prepare(self, covariance):
        if covariance.kept is None:
            raise SpecError("needs the calibrated channels")
        return covariance.matrix

    def slope(self, prepared, kept, dropped):
        (found,) = regression(self, prepared, kept, dropped)
        return found, torch.eye(len(kept))


@dataclass
class Counted:
    """A prepared part with tensors inside."""

    covariance: torch.Tensor
    asked: torch.Tensor


def counting(self, prepared, kept, dropped):
    prepared.asked.add_(1)
    return regression(self, prepared.covariance, kept, dropped)


def reordering(self, covariance, kept, dropped):
    found = regression(self, covariance, kept, dropped)
    kept.copy_(kept.flip(0))
    return found


def drawing(self, covariance, kept, dropped):
    return (torch.randn(len(dropped), len(kept)),)


def only_where(self, covariance, kept, dropped):
    return (covariance[dropped][:, kept] / covariance.diagonal()[kept],)


def only_once(self, covariance):
    return covariance.matrix if covariance.once else None


def twice(self, covariance):
    return covariance.matrix, covariance.matrix.clone()


def of_the_first(self, prepared, kept, dropped):
    return regression(self, prepared[0], kept, dropped)


def refusing(self, covariance):
    raise SpecError("cannot")


def without_lag(self, prepared, kept, dropped):
    (found,) = LeastSquares.slope(self, prepared, kept, dropped)
    return (found[:24],)


def variant(base, **body):
    """A subclass of ``base`` with another body."""
    return type(f"Broken{base.__name__}", (base,), {"__module__": __name__, "__doc__": "Broken.", **body})


def made(method):
    """A compensator whose slope is ``method``."""
    return variant(Good, slope=method)


def planning(**sizes):
    """A compensator with another memory plan."""
    return variant(
        Mean, memory_plan=lambda self, channels, dropped, often: MemoryPlan(**{"working": 0, "held": 0} | sizes)
    )


BROKEN = [
    (made(lambda self, c, kept, dropped: torch.zeros(len(dropped), len(kept))), "as a tuple of matrices"),
    (made(lambda self, c, kept, dropped: None), "as a tuple of matrices, found None"),
    (made(lambda self, c, kept, dropped: (torch.zeros(len(kept), len(dropped) + 1),)), "found float32 (12, 13)"),
    (
        made(lambda self, c, kept, dropped: (torch.zeros(len(dropped), 3), torch.zeros(2, len(kept)))),
        "as float32 (3, 12)",
    ),
    (made(lambda self, c, kept, dropped: (torch.zeros(len(dropped)),)), "as float32 (12, 12), found float32 (12,)"),
    (made(lambda self, c, kept, dropped: (torch.zeros(len(dropped), len(kept)).double(),)), "found float64"),
    (made(lambda self, c, kept, dropped: (c[dropped][:, kept] * torch.inf,)), "NaN or infinity"),
    (made(only_where), "NaN or infinity"),
    (made(lambda self, c, kept, dropped: (c[dropped][:, kept],)), "blows up: the slope of a covariance times 1e+06"),
    (made(drawing), "gives another slope (cut once) for the same input"),
    (made(reordering), "changes the kept channels"),
    (
        variant(Good, slope=lambda self, c, kept, dropped: regression(self, c.add_(torch.eye(24)), kept, dropped)),
        "changes the prepared part",
    ),
    (
        variant(
            Good,
            prepare=lambda self, c: Counted(c.matrix, torch.zeros(1)),
            slope=counting,
            memory_plan=lambda self, channels, dropped, often: MemoryPlan(0, 4 * channels * channels + 4),
        ),
        "changes the prepared part",
    ),
    (variant(Good, slope=Compensator.slope), "has no slope (cut once)"),
    (
        variant(LeastSquares, target="dense_stream", __annotations__={"target": str}, slope=without_lag),
        "matrix 1 of the slope as float32 (32, 12), found float32 (24, 12)",
    ),
    (variant(Good, prepare=only_once), "has no slope (per batch)"),
    (variant(Good, needs_covariance=False, __annotations__={"needs_covariance": ClassVar[bool]}), "never be called"),
    (variant(Good, prepare=twice, slope=of_the_first), "prepares 4608 bytes for 24 channels"),
    (variant(Good, prepare=refusing), "refuses to prepare although it gets the calibrated channels"),
    (planning(limit=0), "limit as an int of at least 1, or None, found 0"),
    (planning(limit=2.5), "found 2.5"),
    (planning(working=-1), "working as an int of 0 or more, found -1"),
    (planning(held=12.0), "held as an int of 0 or more, found 12.0"),
    (
        variant(Mean, mean=lambda self, calibrated, probe: calibrated[:5]),
        "the mean as float32 (24,), found float32 (5,)",
    ),
    (variant(Mean, mean=lambda self, calibrated, probe: calibrated.half()), "found float16 (24,)"),
    (variant(Mean, mean=lambda self, calibrated, probe: calibrated / 0), "NaN or infinity"),
    (variant(Mean, mean=lambda self, calibrated, probe: calibrated.add_(1)), "changes the calibrated mean"),
    (
        variant(Mean, mean=lambda self, calibrated, probe: calibrated * torch.rand(())),
        "another mean for the same input",
    ),
    (variant(ProbeMean, mean=lambda self, calibrated, probe: probe.add_(calibrated)), "changes the probe's mean"),
]


OF_TARGETS = [LeastSquares(target="dense_outputs"), LeastSquares(target="dense_stream")]


@pytest.mark.parametrize("component", [Good, Factored, LeastSquares, *OF_TARGETS, ProbeMean, planning(limit=1)])
def test_what_keeps_the_rules_passes(component):
    check_component(component)


@pytest.mark.parametrize(("component", "words"), BROKEN, ids=[words for _, words in BROKEN])
def test_a_broken_rule_is_named(component, words):
    with pytest.raises(AssertionError) as caught:
        check_component(component)
    assert words in str(caught.value) and component.__name__ in str(caught.value)


def test_a_probe_that_breaks_the_selectors_rules_is_named():
    class Late(type(ProbeMean().selector)):
        """Positions that the batch does not have."""

        name: Literal["late"] = "late"

        def select(self, states, valid, generator):
            rows, positions = super().select(states, valid, generator)
            return rows, positions + 1

    with pytest.raises(AssertionError, match="Late picks positions"):
        check_component(ProbeMean(selector=Late()))


def test_the_covariance_of_the_checks_can_be_solved_unless_it_says_so():
    assert torch.linalg.eigvalsh(some_covariance()).min() > 0
    singular = some_covariance(constant=True)
    assert (singular.diagonal() == 0).sum() == 8 and torch.equal(singular, singular.T)
