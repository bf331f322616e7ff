"""Random pruning: the control for every other method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import MaskApplier, Scorer, Site, SparsityAllocator, Statistic, Strategy, hookimpl
from .allocation import Uniform
from .application import Slice


class RandomScorer(Scorer):
    """Scores drawn at random, seeded, different at every site."""

    statistic: ClassVar[Statistic | None] = None
    exempt: ClassVar[Mapping[str, str]] = {"check_channel_order": "it draws by the number of the channel"}
    name: Literal["random"] = "random"
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the draw")

    def prepare(self, weight: Tensor, site: Site) -> Tensor:
        """Uniform draws; (O, C) -> (C,)."""
        number = 2 * site.layer + (site.kind != "attention") + (0 if site.expert is None else 2**40 * (1 + site.expert))
        generator = torch.Generator().manual_seed((self.seed * 100_003 + number) % 2**63)
        return torch.rand(weight.shape[1], generator=generator).to(weight.device)

    def score(self, prepared: Tensor, statistic: Tensor | None) -> Tensor:
        return prepared


class Random(Strategy):
    """Random: drop units drawn at random, the same share in every layer; the control."""

    name: Literal["random"] = "random"
    scorer: Scorer = RandomScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [RandomScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Random]
