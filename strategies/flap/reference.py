"""The allocations that the shipped codes of FLAP and of PP's FLAP baseline compute, for reproduction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field

from ...registry import SiteScores, SparsityAllocator, SpecError
from ..allocation import kept_width
from .adaptive import standardised


class FlapShipped(SparsityAllocator):
    """FLAP's own code (AL-AM): a head costs the integer 512/3 = 170 channels, whatever the model."""

    needs_scores: ClassVar[bool] = True
    name: Literal["flap_shipped"] = "flap_shipped"
    head_cost: int = Field(default=170, ge=1, description="channels that one head counts for")

    def allocate(self, sites: Sequence[SiteScores], ratio: float | None) -> list[int]:
        if not ratio:  # the code's strict comparison would drop the lowest unit even then
            return [scores.site.units for scores in sites]
        per_site = [standardised(scores) for scores in sites]
        costs = [
            torch.full(z.shape, self.head_cost if scores.site.kind == "attention" else 1, device=z.device)
            for scores, z in zip(sites, per_site, strict=True)
        ]
        values, order = torch.cat(per_site).sort(descending=True)
        kept_cost = torch.cat(costs)[order].cumsum(0)
        threshold = values[(kept_cost - kept_cost[-1] * (1 - ratio)).abs().argmin()]
        return [int((z > threshold).sum()) for z in per_site]


class PPFlapShipped(SparsityAllocator):
    """The FLAP baseline in PP's code: heads are compared in groups of 128 channels, whatever the head size."""

    needs_scores: ClassVar[bool] = True
    name: Literal["pp_flap_shipped"] = "pp_flap_shipped"
    sequence_length: int = Field(
        default=1024, ge=1, description="positions T in the price of attention's score products"
    )
    group: int = Field(default=128, ge=1, description="channels compared together at attention sites")
    mlp_multiple: int = Field(default=64, ge=1, description="kept MLP width rounded up to a multiple of this")

    def allocate(self, sites: Sequence[SiteScores], ratio: float | None) -> list[int]:
        first = [standardised(_double(scores), self._group(scores)) for scores in sites]
        head_price = self._head_price(sites)
        costs = [
            torch.full_like(z, head_price if scores.site.kind == "attention" else 1.0)
            for scores, z in zip(sites, first, strict=True)
        ]
        values, order = torch.cat(first).sort()
        spent = torch.cat(costs)[order].cumsum(0)
        place = torch.searchsorted(spent, spent[-1] * ratio, right=True).clamp(max=len(values) - 1)
        # The code compares single-precision scores with this double-precision threshold, inclusively.
        threshold = values[place].float() if ratio > 0 else values.new_tensor(-torch.inf)
        counts = []
        for scores in sites:
            z = standardised(scores, self._group(scores))
            dropped = int(int((z <= threshold).sum()) / len(z) * scores.site.units)
            counts.append(kept_width(scores.site.units, dropped, self.mlp_multiple if scores.site.kind == "mlp" else 1))
        return counts

    def _group(self, scores: SiteScores) -> int:
        site = scores.site
        if site.kind == "mlp":
            return 1
        if site.channels % self.group:
            raise SpecError(
                f"allocator pp_flap_shipped: {site.label} has {site.channels} channels, which are not whole groups of "
                f"{self.group}; set group to a divisor"
            )
        return self.group

    def _head_price(self, sites: Sequence[SiteScores]) -> float:
        """Multiplications of a head, score products included, relative to those of an MLP channel."""
        attention = next((s.site for s in sites if s.site.kind == "attention"), None)
        mlp = next((s.site for s in sites if s.site.kind == "mlp"), None)
        if attention is None or mlp is None:
            return 1.0
        length, hidden, size = self.sequence_length, attention.outputs, attention.unit_size
        head = length * hidden * size * (len(attention.producers) + 1) + 2 * length**2 * size
        return head / (length * hidden * (len(mlp.producers) + 1))


def _double(scores: SiteScores) -> SiteScores:
    return replace(scores, channels=scores.channels.double())
