"""FLAP's global adaptive allocation: all sites compete, by standardised scores, under one threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import SiteScores, SparsityAllocator


def standardised(scores: SiteScores, group: int | None = None) -> Tensor:
    """z-scores over a site's channels, averaged over each unit (or ``group`` channels); (C,) -> (U,)."""
    channels = scores.channels
    z = (channels - channels.mean()) / channels.std().clamp(min=torch.finfo(channels.dtype).tiny)
    size = scores.site.unit_size if group is None else group
    return z if size == 1 else z.view(-1, size).mean(1)


class GlobalAdaptive(SparsityAllocator):
    """Lowest standardised scores of the whole model go first, until the ratio of its parameters is gone."""

    needs_scores: ClassVar[bool] = True
    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983, adaptive structure search"
    name: Literal["global_adaptive"] = "global_adaptive"
    minimum_units: int = Field(1, ge=0, description="units that every site keeps in any case")

    def allocate(self, sites: Sequence[SiteScores], ratio: float | None) -> list[int]:
        values, costs, owners = [], [], []
        for index, scores in enumerate(sites):
            z = standardised(scores).cpu().double()
            protected = z.topk(min(self.minimum_units, len(z))).indices
            z[protected] = torch.inf
            values.append(z)
            costs.append(torch.full_like(z, float(scores.site.unit_parameters)))
            owners.append(torch.full((len(z),), index))
        z, cost, owner = torch.cat(values), torch.cat(costs), torch.cat(owners)
        order = z.argsort(stable=True)
        spent = cost[order].cumsum(0)
        cut = order[(spent <= ratio * cost.sum() * (1 + 1e-9)) & z[order].isfinite()]
        dropped = torch.bincount(owner[cut], minlength=len(sites))
        return [scores.site.units - int(count) for scores, count in zip(sites, dropped, strict=True)]
