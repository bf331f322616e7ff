"""CFSP's score: the size of the activation, and what share the channel has in the weights around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import MaskApplier, Scorer, Site, SparsityAllocator, Strategy, hookimpl
from .allocation import Uniform
from .application import Slice

PAPER = "CFSP, COLING 2025, arXiv 2409.13199"


class CfspScorer(Scorer):
    """Norm of the activation times the channel's relative weights in the consumer and in all producers.

    ``relative: channel`` divides the weights of a channel by their own sum, as the published code does. The weights
    then cancel: what is left is the norm of the activation. ``output`` divides them by the sum over all channels at the
    same output of the consumer, or at the same input of a producer.
    """

    paper: ClassVar[str] = PAPER
    uses_producers: ClassVar[bool] = True
    name: Literal["cfsp"] = "cfsp"
    relative: Literal["output", "channel"] = Field(
        default="output",
        description="output: weights relative to all channels at the same output; channel: to the channel's own sum, "
        "as in the published code, where the weights cancel",
    )
    power: float = Field(default=1.0, ge=0, description="exponent of the activation's norm")

    def prepare(self, weight: Tensor, site: Site, producers: Sequence[Tensor] = ()) -> Tensor:
        """Sum of the mean relative weights of every matrix; weight (O, C), producers (R, D) each -> (C,)."""
        total = self._relative(weight.abs())
        for producer, rows in zip(site.producers, producers, strict=True):
            for part in producer.segments:
                owned = rows[part.offset : part.offset + site.units * part.per_unit].abs()
                of_units = self._relative(owned.T).view(site.units, -1).sum(1) / site.unit_size
                total = total + of_units.repeat_interleave(site.unit_size)
        return total

    def _relative(self, sizes: Tensor) -> Tensor:
        """Mean over outputs of relative sizes (O, C), (C,); the sizes are not negative."""
        whole = sizes.sum(1 if self.relative == "output" else 0, keepdim=True)
        return (sizes / whole.clamp(min=torch.finfo(sizes.dtype).tiny)).mean(0)

    def score(self, prepared: Tensor, statistic: Tensor) -> Tensor:
        return statistic.sqrt().pow(self.power) * prepared


class Cfsp(Strategy):
    """CFSP's score, the same share in every layer."""

    paper: ClassVar[str] = PAPER
    name: Literal["cfsp"] = "cfsp"
    scorer: Scorer = CfspScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [CfspScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Cfsp]
