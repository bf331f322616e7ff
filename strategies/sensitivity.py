"""Sensitivity allocation: measures what a cut of every site costs, and makes the cheapest cuts that meet the ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from ..registry import Evaluate, Site, SiteScores, SparsityAllocator, hookimpl
from .budget import EXACT, WORST, MeasuringAllocator, not_finite, parameters_to_cut

GRID = 4096
"""Steps into which dynamic programming divides the parameters to cut."""


@dataclass(frozen=True, eq=False)
class Options:
    """What can be cut of a site, from nothing to the most."""

    dropped: np.ndarray
    """(n,) int: numbers of units, ascending from 0."""
    parameters: np.ndarray
    """(n,) float64: what they free."""
    increase: np.ndarray
    """(n,) float64, not decreasing: what cutting them alone adds to the loss, in nats per token."""


class Sensitivity(MeasuringAllocator):
    """Measures what a cut of each site alone adds to the loss, and cuts where the sum of these increases is smallest.

    Increases between measured levels are interpolated; one below 0 counts as 0. The sum ignores that cuts of several
    sites act on each other. The ratio is a share of the parameters, as with ``global_adaptive``, and is met within the
    cheapest step.
    """

    paper: ClassVar[str] = "sensitivity by layer: Han et al., NeurIPS 2015, arXiv 1506.02626; multiple-choice knapsack"
    name: Literal["sensitivity"] = "sensitivity"
    levels: tuple[float, ...] = Field(
        default=(0.2, 0.4, 0.6, 0.8, 1.0),
        description="shares of a site's units whose cut is measured, ascending, the last 1; every count of a site "
        "with at most twice as many units",
    )

    @field_validator("levels")
    @classmethod
    def _ascending_to_one(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if not levels or levels[-1] != 1 or levels[0] <= 0 or sorted(set(levels)) != list(levels):
            raise ValueError(f"levels are shares above 0 in ascending order, the last 1; found {list(levels)!r:.100}")
        return levels

    def allocate(self, sites: Sequence[SiteScores], ratio: float, evaluate: Evaluate | None = None) -> list[int]:
        """Kept units of every site.

        Raises :class:`SpecError` if ``minimum_units`` makes the ratio impossible, and :class:`NonFiniteError` if no cut
        has a finite objective.
        """
        evaluate = self._measuring(evaluate)
        places = [scores.site for scores in sites]
        droppable = [self._droppable(site) for site in places]
        most = [int(dropped[-1]) for dropped in droppable]
        budget = parameters_to_cut(self.name, places, most, ratio, self.minimum_units)
        increases = self._increases(places, evaluate) if budget else [np.zeros(site.units + 1) for site in places]
        options = [
            Options(dropped, dropped * float(site.unit_parameters), increase[dropped])
            for site, dropped, increase in zip(places, droppable, increases, strict=True)
        ]
        chosen = filled(options, cheapest(options, budget), budget)
        return [site.units - int(o.dropped[n]) for site, o, n in zip(places, options, chosen, strict=True)]

    def _droppable(self, site: Site) -> np.ndarray:
        """Numbers of units that may go, (n,) ascending from 0."""
        dropped = np.arange(max(0, site.units - self.minimum_units) + 1)
        return dropped[(dropped == 0) | ((site.units - dropped) % self.granularity(site) == 0)]

    def _measured(self, site: Site) -> list[int]:
        """Numbers of units whose cut is measured, ascending."""
        if site.units <= 2 * len(self.levels):
            return list(range(1, site.units + 1))
        return sorted({max(1, round(level * site.units)) for level in self.levels})

    def _increases(self, sites: Sequence[Site], evaluate: Evaluate) -> list[np.ndarray]:
        """For every site, what cutting 0 to all of its units adds to the loss; (U + 1,) float64."""
        whole = [site.units for site in sites]
        cuts = [(place, dropped) for place, site in enumerate(sites) for dropped in self._measured(site)]
        candidates = [[*whole[:place], whole[place] - dropped, *whole[place + 1 :]] for place, dropped in cuts]
        dense, *losses = evaluate([whole, *candidates], self.tokens, **self._how)
        if not any(map(math.isfinite, losses)):
            raise not_finite(self.name, self.objective)
        measured = [np.zeros((2, 1)) for _ in sites]
        for (place, dropped), loss in zip(cuts, losses, strict=True):
            increase = min(max(loss - dense, measured[place][1, -1]), WORST)
            measured[place] = np.append(measured[place], [[dropped], [increase]], axis=1)
        return [np.interp(np.arange(count + 1), *found) for count, found in zip(whole, measured, strict=True)]


def cheapest(options: Sequence[Options], budget: float) -> list[int]:
    """The option of every site with the smallest sum of increases that uses up the budget, to a grid of about
    ``GRID`` steps: the multiple-choice knapsack, by dynamic programming."""
    steps = [np.diff(option.parameters).min() for option in options if len(option.dropped) > 1]
    if not steps or budget < min(steps):
        return [0] * len(options)
    step = min(steps) * max(1, budget // (GRID * min(steps)))
    size = int(budget // step)
    best = np.full(size + 1, np.inf)  # the smallest sum that uses exactly so many steps
    best[0] = 0
    table = []
    for option in options:
        needed = np.ceil(option.parameters / step / EXACT).astype(int)
        sums, choice = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=np.int32)
        for number in np.flatnonzero(np.diff(needed, append=np.inf)):  # the largest cut of every number of steps
            if (cost := needed[number]) > size:
                break
            candidates = best[: size + 1 - cost] + option.increase[number]
            better = candidates < sums[cost:]
            sums[cost:][better], choice[cost:][better] = candidates[better], number
        best = sums
        table.append((choice, needed))
    used, chosen = int(np.flatnonzero(np.isfinite(best))[-1]), list[int]()
    for choice, needed in reversed(table):
        chosen.append(int(choice[used]))
        used -= needed[chosen[-1]]
    return chosen[::-1]


def filled(options: Sequence[Options], chosen: Sequence[int], budget: float) -> list[int]:
    """``chosen`` with more units cut where a parameter costs least, until no unit fits into the rest of the budget."""
    chosen = list(chosen)
    rest = budget - sum(float(option.parameters[n]) for option, n in zip(options, chosen, strict=True))
    while True:
        rates = {}
        for place, (option, n) in enumerate(zip(options, chosen, strict=True)):
            if n + 1 < len(option.dropped) and (cost := option.parameters[n + 1] - option.parameters[n]) <= rest:
                rates[place] = (option.increase[n + 1] - option.increase[n]) / cost
        if not rates:
            return chosen
        place = min(rates, key=rates.__getitem__)
        rest -= float(np.diff(options[place].parameters)[chosen[place]])
        chosen[place] += 1


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [Sensitivity]
