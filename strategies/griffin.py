"""GRIFFIN, BWAP and GLASS: MLP channels chosen by the prompt's own activations, for decode steps.

Letters: B rows, T positions, C channels; z (C,) is what enters the consumer for one token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import (
    ChannelHistory,
    HistoryMerger,
    MaskApplier,
    Policy,
    ProbeSelector,
    Scorer,
    Site,
    SparsityAllocator,
    Statistic,
    Strategy,
    hookimpl,
    merge_mean,
    position_means,
    position_sums,
)
from .allocation import MlpOnly
from .application import Slice
from .policies import DecodeOnly, EveryN
from .pp.mergers import ProbeOnly
from .pp.selectors import WholeBatch

GRIFFIN = "GRIFFIN, COLM 2024, arXiv 2404.01365"
BWAP = "BWAP, arXiv 2608.14003"
GLASS = "GLASS, arXiv 2508.14302"


class Share(Statistic):
    """(z / ||z||)^2, the share of a channel in the energy of a token; its history is the mean over rows."""

    def observe(self, history: ChannelHistory, x: Tensor, valid: Tensor | None) -> None:
        merge_mean(history, *position_sums(normalised(x), valid, square=True))


class MeanShare(Share):
    """Mean over rows of (z / ||z||)^2 at each position."""

    name: Literal["mean_share"] = "mean_share"

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        return position_means(normalised(x), valid, square=True)


class LargestShare(Share):
    """(z / ||z||)^2 at each position, of the row where its sum over positions is largest, channel by channel."""

    name: Literal["largest_share"] = "largest_share"

    def measure(self, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        shares = normalised(x).square()
        if valid is not None:
            shares = shares.masked_fill(~valid[..., None], 0)
        row = shares.sum(1).argmax(0)
        return shares.gather(0, row.expand(1, x.shape[1], -1))[0]


def normalised(x: Tensor) -> Tensor:
    """x / ||x|| token by token; (..., C) -> (..., C) float32."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


class ShareNorm(Scorer):
    """L2 norm over tokens of the token-normalised activation; it does not read the layer's weights."""

    def score(self, prepared: None, statistic: Tensor) -> Tensor:
        return statistic.sqrt()


class GriffinScorer(ShareNorm):
    """L2 norm over tokens of the token-normalised activation; it does not read the layer's weights."""

    paper: ClassVar[str] = GRIFFIN
    statistic: ClassVar[Statistic | None] = MeanShare()
    name: Literal["griffin"] = "griffin"


class BwapScorer(ShareNorm):
    """GRIFFIN's score row by row, and of these the largest; no weights."""

    paper: ClassVar[str] = BWAP
    exempt: ClassVar[Mapping[str, str]] = {
        "check_observation": "history is the mean over rows, a probe has the largest"
    }
    statistic: ClassVar[Statistic | None] = LargestShare()
    name: Literal["bwap"] = "bwap"


class RankMerge(HistoryMerger):
    """A weighted mean of the channels' ranks in the probe and in the calibrated history (GLASS)."""

    paper: ClassVar[str] = GLASS
    exempt: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("check_merge_order", "check_merge_scale"), "it merges ranks over all positions"
    )
    name: Literal["ranks"] = "ranks"
    prior: float = Field(default=0.5, ge=0, le=1, description="the history's weight")

    def merge(self, probe: Tensor, history: Tensor, site: Site) -> Tensor:
        """Ranks 0 (lowest) to C - 1 in the first row, zeros in the others; (t, C), (t, C) -> (t, C)."""
        merged = torch.zeros_like(probe)
        merged[0] = torch.lerp(ranks(probe.sum(0)), ranks(history.sum(0)), self.prior)
        return merged


def ranks(values: Tensor) -> Tensor:
    """The place of every value in ascending order, equal ones by their index; (C,) -> (C,) float32."""
    return values.argsort(stable=True).argsort().float()


class PromptChannels(Strategy):
    """GRIFFIN without a name: the base of strategies that change some of its parts."""

    paper: ClassVar[str] = GRIFFIN
    scorer: Scorer = GriffinScorer()
    allocator: SparsityAllocator = MlpOnly()
    applier: MaskApplier = Slice()
    selector: ProbeSelector | None = Field(default=WholeBatch(), description="which part of a batch to probe")
    merger: HistoryMerger | None = Field(default=ProbeOnly(), description="how the probe and history are merged")
    policy: Policy = Field(default=DecodeOnly(), description="generation: which calls are pruned, and when")


class Griffin(PromptChannels):
    """GRIFFIN: MLP channels with the largest token-normalised activations in the prompt, for decode steps only."""

    name: Literal["griffin"] = "griffin"


class Bwap(PromptChannels):
    """BWAP: GRIFFIN for batches: the largest row counts, and units are chosen again after every n tokens."""

    paper: ClassVar[str] = BWAP
    name: Literal["bwap"] = "bwap"
    scorer: Scorer = BwapScorer()
    policy: Policy = Field(default=EveryN(prompt="dense"), description="generation: which calls are pruned, and when")


class Glass(PromptChannels):
    """GLASS: GRIFFIN whose ranks are merged with those of calibration text."""

    paper: ClassVar[str] = GLASS
    name: Literal["glass"] = "glass"
    merger: HistoryMerger | None = Field(default=RankMerge(), description="how the probe and history are merged")
    long_prompts: Literal["refuse", "extend"] = Field(
        default="extend", description="prompts with more positions than the calibration text had"
    )


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [GriffinScorer, BwapScorer]


@hookimpl
def history_mergers() -> list[type[HistoryMerger]]:
    return [RankMerge]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Griffin, Bwap, Glass]
