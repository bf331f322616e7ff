"""One ranking of all units of the model by their scores as they are, without standardising them by site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from ..registry import SiteScores, SparsityAllocator, SpecError, hookimpl
from .budget import EXACT, kept_by_rank, parameters_to_cut


class GlobalRanking(SparsityAllocator):
    """The units with the lowest scores of the model are cut, heads and channels in one ranking.

    Useful only with scores that mean the same in every layer, such as those by gradients of the loss.
    """

    needs_scores: ClassVar[bool] = True
    name: Literal["global_ranking"] = "global_ranking"
    ratio_of: Literal["parameters", "units"] = Field(
        default="parameters",
        description="what the ratio is a share of: of the parameters of all units, or of their number, heads and "
        "channels alike (as published for GISP)",
    )
    minimum_units: int = Field(default=1, ge=0, description="units that every site keeps in any case")

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        """Kept units of every site; raises :class:`SpecError` if ``minimum_units`` makes the ratio impossible."""
        places = [scores.site for scores in sites]
        most = [max(0, site.units - self.minimum_units) for site in places]
        if self.ratio_of == "parameters":
            budget = parameters_to_cut(self.name, places, most, ratio, self.minimum_units)
            costs = [site.unit_parameters for site in places]
        else:
            units = sum(site.units for site in places)
            if ratio * units > sum(most) * EXACT:
                raise SpecError(
                    f"allocator {self.name}: a ratio of {ratio:.4g} of these layers' units is out of reach: every site "
                    f"keeps minimum_units: {self.minimum_units}, so {math.floor(sum(most) / units * 1e4) / 1e4:.4g} "
                    "can be cut; lower the ratio or minimum_units"
                )
            budget, costs = ratio * units * EXACT, [1] * len(places)
        return kept_by_rank([scores.units for scores in sites], costs, budget, self.minimum_units)


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [GlobalRanking]
