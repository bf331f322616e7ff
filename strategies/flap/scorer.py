"""FLAP's fluctuation score."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import Fluctuation, Scorer, Site, Statistic


class FlapScore(Scorer):
    """FLAP's score without a name: the base of scorers that differ in their statistic."""

    paper: ClassVar[str] = "FLAP, AAAI 2024, arXiv 2312.11983, metric WIFV"
    square_attention: bool = Field(default=False, description="square the channel scores of attention, as FLAP does")
    weighted: bool = Field(default=True, description="false leaves the weights out (FLAP's IFV)")

    def prepare(self, weight: Tensor, site: Site) -> tuple[Tensor, int]:
        """The factor ``sum_o W[o,c]^2`` (C,), or ones if not ``weighted``, and the exponent of the score, 1 or 2."""
        weights = weight.square().sum(0) if self.weighted else torch.ones(weight.shape[1], device=weight.device)
        return weights, 2 if self.square_attention and site.kind == "attention" else 1

    def score(self, prepared: tuple[Tensor, int], statistic: Tensor) -> Tensor:
        weights, power = prepared
        return (statistic * weights).pow(power)


class FluctuationScorer(FlapScore):
    """Fluctuation of the channel about its mean times its squared weights (FLAP, WIFV)."""

    statistic: ClassVar[Statistic | None] = Fluctuation()
    name: Literal["fluctuation"] = "fluctuation"
