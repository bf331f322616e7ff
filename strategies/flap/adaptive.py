"""FLAP's global adaptive allocation: one threshold on the standardised scores of all sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import SiteScores, SparsityAllocator
from ..budget import kept_by_rank, parameters_to_cut


def standardised(scores: SiteScores, group: int | None = None) -> Tensor:
    """z-scores over a site's channels, averaged over each unit (or ``group`` channels); (C,) -> (U,)."""
    channels = scores.channels
    z = (channels - channels.mean()) / channels.std().clamp(min=torch.finfo(channels.dtype).tiny)
    size = scores.site.unit_size if group is None else group
    return z if size == 1 else z.view(-1, size).mean(1)


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
        places = [scores.site for scores in sites]
        most = [max(0, site.units - self.minimum_units) for site in places]
        budget = parameters_to_cut(self.name, places, most, ratio, self.minimum_units)
        costs = [site.unit_parameters for site in places]
        return kept_by_rank([standardised(scores) for scores in sites], costs, budget, self.minimum_units)
