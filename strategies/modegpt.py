"""MoDeGPT's choice of MLP channels: ridge leverage (Lin et al., ICLR 2025, arXiv 2408.09632)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import MemoryPlan, Order, Scorer, Site, SiteCovariance, hookimpl
from .ridged import RidgedChooser, inverse_of


class ModegptChooser(RidgedChooser):
    """Keeps channels with the largest ridge leverage in the covariance, whatever their weights (MoDeGPT's MLP part).

    MoDeGPT cuts dimensions inside heads, not heads. Here a head has the sum of its channels' leverage: the number of
    directions that they add to the others.
    """

    paper: ClassVar[str] = "MoDeGPT, ICLR 2025, arXiv 2408.09632, type I (Nystroem)"
    name: Literal["modegpt"] = "modegpt"
    centred: bool = Field(
        default=True, description="false takes second moments about 0, as published, in place of the covariance"
    )
    absolute: bool = Field(
        default=False,
        description="the ridge is the number that is added to the sums over all tokens, as in the published code "
        "(0.01), not a share of the mean variance",
    )

    def order(self, covariance: SiteCovariance, weight: Tensor, site: Site) -> Order:
        """Leverage ``1 - r ((S + r)^-1)_cc`` of each channel c, with the ridge r; the lowest goes first."""
        matrix, ridge = covariance.matrix, self.ridge
        if not self.centred:
            matrix.addr_(covariance.mean, covariance.mean)
        if self.absolute:
            share = matrix.diagonal().mean() * covariance.tokens
            ridge = float((0.01 if ridge is None else ridge) / share.clamp(min=torch.finfo(share.dtype).tiny))
        added, inverse = inverse_of(covariance, ridge)
        missing = (added * inverse.diagonal()).view(site.units, -1).sum(1)
        units = missing.argsort(descending=True, stable=True)
        leverage = (site.unit_size - missing[units]).clamp(min=0)
        return Order(units.to(matrix.device), leverage.float().to(matrix.device))

    def memory_plan(self, site: Site) -> MemoryPlan:
        """One matrix (C, C) in double precision."""
        return self._plan(8 * site.channels**2)


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [ModegptChooser]
