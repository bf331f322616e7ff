"""Wanda-sp: the structured form of Wanda (Sun et al., ICLR 2024), as FLAP's authors define it."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from ..registry import MaskApplier, Scorer, Site, SparsityAllocator, Strategy, hookimpl
from .allocation import Uniform
from .application import Slice


class WandaSpScorer(Scorer):
    """Root of the mean square activation times the sum of absolute weights."""

    paper: ClassVar[str] = "Wanda, ICLR 2024, arXiv 2306.11695; structured in FLAP, AAAI 2024, arXiv 2312.11983"

    name: Literal["wanda_sp"] = "wanda_sp"

    def prepare(self, weight: Tensor, site: Site) -> Tensor:
        """``sum_o |W[o,c]|``; (O, C) -> (C,)."""
        return weight.abs().sum(0)

    def score(self, prepared: Tensor, statistic: Tensor) -> Tensor:
        return statistic.sqrt() * prepared


class WandaSp(Strategy):
    """Wanda-sp: decide once, by calibrated activations and weights, the same share in every layer."""

    paper: ClassVar[str] = "Wanda, ICLR 2024, arXiv 2306.11695; structured in FLAP, AAAI 2024, arXiv 2312.11983"

    name: Literal["wanda_sp"] = "wanda_sp"
    scorer: Scorer = WandaSpScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [WandaSpScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [WandaSp]
