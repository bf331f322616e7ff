"""The FLAP baseline in the published code of Probe Pruning, which differs from its authors' FLAP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import (
    ChannelHistory,
    Compensator,
    Fluctuation,
    Scorer,
    SiteScores,
    SparsityAllocator,
    SpecError,
    Statistic,
)
from ..allocation import kept_width
from ..compensation.mean import Mean
from ..flap.adaptive import standardised
from ..flap.scorer import FlapScore
from .pp import PPRepository


class PPReferenceFluctuation(Statistic):
    """The recurrence of the FLAP baseline in PP's code: the batch mean is divided as if it were a sum."""

    name: Literal["fluctuation_pp_reference"] = "fluctuation_pp_reference"
    tracks_mean: bool = True

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        history.grow(x.shape[1])
        seen, batch = history.tokens, x.shape[0]
        old = torch.zeros(x.shape[-1], device=x.device) if history.mean is None else history.mean
        new = (old * seen + x.float().mean((0, 1))) / (seen + batch)
        if seen:
            values = x.float()
            deviations = ((values - new) * (values - old)).sum(0)
            table = history.table[: x.shape[1]]
            table.mul_((seen - 1) / (seen + batch - 1)).add_(deviations, alpha=1 / (seen + batch))
        history.mean = new
        history.tokens = seen + batch

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        return Fluctuation().measure(x, valid, mean)


class PPReferenceFlapScorer(FlapScore):
    """FLAP's score by the recurrence of PP's published code, which does not square attention."""

    statistic: ClassVar[Statistic | None] = PPReferenceFluctuation()
    exempt: ClassVar[Mapping[str, str]] = {"check_observation": "the published recurrence divides means as if sums"}
    name: Literal["pp_reference_flap"] = "pp_reference_flap"


class PPReferenceFlapAllocator(SparsityAllocator):
    """The FLAP baseline in PP's code: heads are compared in groups of 128 channels, whatever the head size."""

    needs_scores: ClassVar[bool] = True
    exempt: ClassVar[Mapping[str, str]] = {"check_budget": "the published price of a head is not its parameters"}
    name: Literal["pp_reference_flap"] = "pp_reference_flap"
    sequence_length: int = Field(
        default=1024, ge=1, description="positions T in the price of attention's score products"
    )
    group: int = Field(default=128, ge=1, description="channels compared together at attention sites")
    mlp_multiple: int = Field(default=64, ge=1, description="kept MLP width rounded up to a multiple of this")

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
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
            counts.append(
                kept_width(scores.site.units, dropped, self.mlp_multiple if scores.site.kind != "attention" else 1)
            )
        return counts

    def _group(self, scores: SiteScores) -> int:
        site = scores.site
        if site.kind != "attention":
            return 1
        if site.channels % self.group:
            raise SpecError(
                f"allocator pp_reference_flap: {site.label} has {site.channels} channels, which are not whole groups "
                f"of {self.group}; set group to a divisor"
            )
        return self.group

    def _head_price(self, sites: Sequence[SiteScores]) -> float:
        """Multiplications of a head, score products included, relative to those of an MLP channel."""
        attention = next((s.site for s in sites if s.site.kind == "attention"), None)
        mlp = next((s.site for s in sites if s.site.kind != "attention"), None)
        if attention is None or mlp is None:
            return 1.0
        length, hidden, size = self.sequence_length, attention.outputs, attention.unit_size
        head = length * hidden * size * (len(attention.producers) + 1) + 2 * length**2 * size
        return head / (length * hidden * (len(mlp.producers) + 1))


def _double(scores: SiteScores) -> SiteScores:
    return replace(scores, channels=scores.channels.double())


class PPReferenceFlap(PPRepository):
    """The FLAP baseline of PP's published code."""

    name: Literal["pp_reference_flap"] = "pp_reference_flap"
    scorer: Scorer = PPReferenceFlapScorer()
    allocator: SparsityAllocator = PPReferenceFlapAllocator()
    compensate: Compensator = Mean()
