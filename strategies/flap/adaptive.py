"""FLAP's global adaptive allocation: one threshold on the standardised scores of all sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import SiteScores, SparsityAllocator
from ..budget import parameters_to_cut


def standardised(scores: SiteScores, group: int | None = None) -> Tensor:
    """z-scores over a site's channels, averaged over each unit (or ``group`` channels); (C,) -> (U,)."""
    channels = scores.channels
    z = (channels - channels.mean()) / channels.std().clamp(min=torch.finfo(channels.dtype).tiny)
    size = scores.site.unit_size if group is None else group
    return z if size == 1 else z.view(-1, size).mean(1)


def _affordable(cost: Tensor, free: Tensor, budget: float) -> Tensor:
    """Indices (k,) of the units that fit into the budget, taken in order; cost (U,), free (U,) bool."""
    rest, taken = free.nonzero().flatten(), []
    # Every iteration ends at a unit that does not fit and drops all units of its cost or more.
    while len(rest := rest[cost[rest] <= budget]):
        spent = cost[rest].cumsum(0)
        fits = int((spent <= budget).sum())
        taken.append(rest[:fits])
        budget -= float(spent[fits - 1])
        rest = rest[fits:]
    return torch.cat(taken) if taken else rest


class GlobalAdaptive(SparsityAllocator):
    """The units with the lowest standardised scores of the model are cut, until the ratio of its parameters is met.

    A unit that has more parameters than are left to cut is skipped; smaller ones after it may still be cut.
    """

    needs_scores: ClassVar[bool] = True
    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983, adaptive structure search"
    name: Literal["global_adaptive"] = "global_adaptive"
    minimum_units: int = Field(default=1, ge=0, description="units that every site keeps in any case")

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        """Kept units of every site; raises :class:`SpecError` if ``minimum_units`` makes the ratio impossible."""
        values, costs, owners = [], [], []
        for index, scores in enumerate(sites):
            z = standardised(scores).cpu().double()
            protected = z.topk(min(self.minimum_units, len(z))).indices
            z[protected] = torch.inf
            values.append(z)
            costs.append(torch.full_like(z, float(scores.site.unit_parameters)))
            owners.append(torch.full((len(z),), index))
        z, cost, owner = torch.cat(values), torch.cat(costs), torch.cat(owners)
        free, places = z.isfinite(), [scores.site for scores in sites]
        most = [max(0, site.units - self.minimum_units) for site in places]
        budget = parameters_to_cut(self.name, places, most, ratio, self.minimum_units)
        order = z.argsort(stable=True)
        cut = order[_affordable(cost[order], free[order], budget)]
        dropped = torch.bincount(owner[cut], minlength=len(sites))
        return [scores.site.units - int(count) for scores, count in zip(sites, dropped, strict=True)]
