"""Greedy allocation: cuts step by step, each time where the measured loss rises least for what is freed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..registry import Evaluate, Site, SiteScores, SparsityAllocator, hookimpl
from .budget import WORST, MeasuringAllocator, not_finite, parameters_to_cut


class Greedy(MeasuringAllocator):
    """Cuts in steps: each at the site where the loss of the model, with all cuts so far, rises least per parameter.

    So, unlike ``sensitivity``, it sees how cuts act on each other. The ratio is a share of the parameters, as with
    ``global_adaptive``, and is met within the cheapest unit that is left.

    The increase of a site is measured anew only when it comes first in the queue, with what was cut in between (lazy
    evaluation). This finds the same steps as measuring all sites where increases only grow with more cuts.
    """

    paper: ClassVar[str] = "greedy selection with lazy evaluation: Minoux, Optimization Techniques, 1978"
    name: Literal["greedy"] = "greedy"
    tokens: int = Field(default=512, ge=2, description=MeasuringAllocator.model_fields["tokens"].description)
    step: float = Field(default=0.25, gt=0, le=1, description="share of a site's units in one step, at least one unit")

    def allocate(self, sites: Sequence[SiteScores], ratio: float, evaluate: Evaluate | None = None) -> list[int]:
        """Kept units of every site.

        Raises :class:`SpecError` if ``minimum_units`` makes the ratio impossible, and :class:`NonFiniteError` if no
        further step has a finite objective.
        """
        evaluate = self._measuring(evaluate)
        places = [scores.site for scores in sites]
        most = [site.units - self._least(site) for site in places]
        budget = parameters_to_cut(self.name, places, most, ratio, self.minimum_units)
        counts = [site.units for site in places]
        if not budget:
            return counts
        steps, freed = self._steps(places, counts, budget, evaluate), 0.0
        for percent in evaluate.progress(range(1, 101), "cutting step by step, percent", 100):
            while freed < budget * percent / 100 and (step := next(steps, None)) is not None:
                freed += step
        return counts

    def _steps(self, sites: Sequence[Site], counts: list[int], budget: float, evaluate: Evaluate) -> Iterator[float]:
        """Cut ``counts`` step by step until no unit fits into the budget; gives the parameters that each step frees."""
        first = [self._without(sites, counts, place, budget) for place in range(len(sites))]
        # All at once, so that progress shows their number.
        loss, *_ = evaluate([counts, *filter(None, first)], self.tokens, **self._how)
        loss, done = min(loss, WORST), 0
        queue = [(-math.inf, done - 1, place) for place in range(len(sites))]
        """The increase per parameter of a site's next step, how many steps were done when it was measured, the site."""
        while queue:
            rate, measured, place = heapq.heappop(queue)
            candidate = self._without(sites, counts, place, budget)
            if candidate is None:
                continue
            freed = (counts[place] - candidate[place]) * sites[place].unit_parameters
            found = min(*evaluate([candidate], self.tokens, **self._how), WORST)
            if measured < done:
                rate = (found - loss) / freed
                if queue and rate > queue[0][0]:
                    heapq.heappush(queue, (rate, done, place))
                    continue
            if found >= WORST:  # so has every other step
                raise not_finite(self.name, self.objective)
            counts[:], loss, budget = candidate, found, budget - freed
            heapq.heappush(queue, (rate, done, place))
            done += 1
            evaluate.record(
                site=sites[place].label, kept=counts[place], objective=self.objective, tokens=self.tokens, best=loss
            )
            yield freed

    def _least(self, site: Site) -> int:
        """The fewest units that a site may keep."""
        multiple = self.granularity(site)
        return min(site.units, math.ceil(self.minimum_units / multiple) * multiple)

    def _without(self, sites: Sequence[Site], counts: list[int], place: int, budget: float) -> list[int] | None:
        """``counts`` after one more step at a site, as far as the budget allows; None where no step is possible."""
        site, kept = sites[place], counts[place]
        multiple = self.granularity(site)
        size = min(max(round(self.step * site.units), multiple), int(budget // site.unit_parameters))
        found = max(self._least(site), math.ceil((kept - size) / multiple) * multiple)
        return [*counts[:place], found, *counts[place + 1 :]] if found < kept else None


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [Greedy]
