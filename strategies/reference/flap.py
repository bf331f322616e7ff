"""The published code of FLAP (CASIA-IVA-Lab/FLAP): its recurrence, its metric WIFN and its allocation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import (
    ChannelHistory,
    Compensator,
    Fluctuation,
    MaskApplier,
    Scorer,
    Site,
    SiteScores,
    SparsityAllocator,
    Statistic,
    Strategy,
    position_sums,
)
from ..application import Slice
from ..compensation.mean import Mean
from ..flap.adaptive import standardised
from ..flap.scorer import FlapScore
from ..wanda_sp import WandaSpScorer


class FlapReferenceFluctuation(Statistic):
    """The recurrence of FLAP's own code: sequence by sequence, about the new mean only.

    The code keeps the running mean without a copy while updating it, so the deviation from the old and
    from the new mean are the same; the first sequence is ignored.
    """

    name: Literal["fluctuation_flap_reference"] = "fluctuation_flap_reference"
    tracks_mean: bool = True

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        history.grow(x.shape[1])
        for b in range(x.shape[0]):
            row, seen = x[b : b + 1], history.tokens
            mean = row.float().mean((0, 1))
            history.mean = mean if history.mean is None else (history.mean * seen + mean) / (seen + 1)
            if seen:
                deviations, _ = position_sums(row, None, square=True, centre=history.mean)
                history.table[: x.shape[1]].mul_((seen - 1) / seen).add_(deviations, alpha=1 / (seen + 1))
            history.tokens = seen + 1

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        return Fluctuation().measure(x, valid, mean)


class FlapReferenceScorer(FlapScore):
    """FLAP's score (WIFV, or IFV without weights) by the recurrence of its published code."""

    statistic: ClassVar[Statistic | None] = FlapReferenceFluctuation()
    exempt: ClassVar[Mapping[str, str]] = {"check_observation": "the published recurrence ignores the first sequence"}
    name: Literal["flap_reference"] = "flap_reference"
    square_attention: bool = Field(default=True, description="square the channel scores of attention")


class Wifn(Scorer):
    """Wanda-sp's score, squared at attention: the metric WIFN of FLAP's published code."""

    name: Literal["wifn"] = "wifn"

    def prepare(self, weight: Tensor, site: Site) -> tuple[Tensor, int]:
        """``sum_o |W[o,c]|`` and the power of the score; (O, C) -> (C,), 1 or 2."""
        return weight.abs().sum(0), 2 if site.kind == "attention" else 1

    def score(self, prepared: tuple[Tensor, int], statistic: Tensor) -> Tensor:
        weights, power = prepared
        return WandaSpScorer().score(weights, statistic).pow(power)


class FlapReferenceAllocator(SparsityAllocator):
    """FLAP's own code (AL-AM): a head costs the integer 512/3 = 170 channels, whatever the model."""

    needs_scores: ClassVar[bool] = True
    exempt: ClassVar[Mapping[str, str]] = {"check_budget": "the published price of a head is not its parameters"}
    name: Literal["flap_reference"] = "flap_reference"
    head_cost: int = Field(default=170, ge=1, description="channels that one head counts for")

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
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


class FlapReference(Strategy):
    """FLAP as its authors' code computes it."""

    name: Literal["flap_reference"] = "flap_reference"
    scorer: Scorer = FlapReferenceScorer()
    allocator: SparsityAllocator = FlapReferenceAllocator()
    applier: MaskApplier = Slice()
    compensate: Compensator = Mean()
