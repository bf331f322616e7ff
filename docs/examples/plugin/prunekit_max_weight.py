"""A prunekit plugin: a scorer of its own, and Probe Pruning that decides by it."""

from typing import Literal

from prunekit.registry import Scorer, hookimpl
from prunekit.strategies import ProbePruning


class MaxWeight(Scorer):
    """Largest weight times mean square activation."""

    name: Literal["max_weight"] = "max_weight"

    def prepare(self, weight, site):
        return weight.abs().amax(0)

    def score(self, prepared, statistic):
        return prepared * statistic


class MaxWeightPP(ProbePruning):
    """Probe Pruning that scores channels by their largest weight."""

    name: Literal["max_weight_pp"] = "max_weight_pp"
    scorer: Scorer = MaxWeight()


@hookimpl
def scorers():
    return [MaxWeight]


@hookimpl
def strategies():
    return [MaxWeightPP]
