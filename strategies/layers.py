"""Shares for every decoder layer: by depth, by outliers, by what a layer changes, by the spectrum of its weights."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from ..registry import (
    BlockInfluence,
    BlockStatistic,
    LayerWeight,
    Site,
    SiteScores,
    SparsityAllocator,
    SpecError,
    WeightStatistic,
    hookimpl,
)
from .allocation import GROUPS, apportioned

TINY = 1e-9
"""A share of the ratio that is rounding."""


class LayerShares(SparsityAllocator):
    """A share to cut for every layer; heads and channels each lose the ratio, within one unit over all layers.

    Shares are limited to what a layer may lose (``maximum``; every site keeps a unit). What the limits take from some
    layers, the others lose in proportion to their shares.
    """

    uses_scores: ClassVar[bool] = True
    maximum: float = Field(default=0.95, gt=0, lt=1, description="largest share of its units that a layer may lose")
    mlp_multiple: int = Field(default=1, ge=1, description="kept MLP widths are multiples of this; 64 is fast on GPUs")

    @abstractmethod
    def shares(self, layers: Sequence[SiteScores], ratio: float) -> np.ndarray:
        """The share of every layer, (n,) with mean ``ratio``; ``layers``: one site of each, ascending."""

    def granularity(self, site: Site) -> int:
        return self.mlp_multiple if site.group in ("mlp", "expert") else 1

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        """Kept units of every site; raises :class:`SpecError` where ``maximum`` makes the ratio impossible."""
        first = {scores.site.layer: scores for scores in reversed(sites)}
        layers = [first[layer] for layer in sorted(first)]
        wanted = self.shares(layers, ratio) if ratio else np.zeros(len(layers))
        of_layer = dict(zip(sorted(first), wanted, strict=True))
        counts = [scores.site.units for scores in sites]
        for kind in GROUPS:
            places = [place for place, scores in enumerate(sites) if scores.site.group == kind]
            here = [sites[place] for place in places]
            multiple = self.granularity(here[0].site) if here else 1
            units = np.array([scores.site.units for scores in here], dtype=float)
            most = np.minimum(self.maximum, np.maximum(0, 1 - multiple / np.maximum(units, 1)))
            if ratio * units.sum() > most @ units * (1 + TINY):
                helps = ", or raise maximum" if np.any(most >= self.maximum) else ""
                raise SpecError(
                    f"allocator {self.name}: a ratio of {ratio:.4g} is out of reach: with maximum: {self.maximum:g} "
                    f"and a unit kept at every site, {math.floor(most @ units / units.sum() * 1e4) / 1e4:.4g} of the "
                    f"{kind} units can be cut; lower the ratio{helps}"
                )
            shares = within(np.array([of_layer[scores.site.layer] for scores in here]), units, ratio, most)
            for place, count in zip(places, apportioned(here, list(shares), multiple), strict=True):
                counts[place] = count
        return counts


def within(shares: np.ndarray, units: np.ndarray, ratio: float, most: np.ndarray) -> np.ndarray:
    """Shares (n,) between 0 and ``most`` (n,) that cut ``ratio`` of all ``units`` (n,).

    Shares beyond a limit are set to it, and the others are scaled by one factor; where all others are 0, they grow
    alike. The limits allow the ratio.
    """
    found, wanted = np.clip(shares, 0, most), ratio * units.sum()
    for _ in range(2 * len(units)):  # each time the ratio is met, or one more share is at its limit
        missing = wanted - found @ units
        if abs(missing) <= TINY * wanted:
            break
        if missing < 0:
            return found * (wanted / (found @ units))
        below = found < most
        scaled = (found * units)[below].sum()
        more = found * (missing / scaled) if scaled > 0 else np.full(len(units), missing / units[below].sum())
        found = np.where(below, np.minimum(found + more, most), found)
    return found


class LogIncremental(LayerShares):
    """Shares that grow with the logarithm of depth: the error of early layers reaches all later ones.

    Layer i of n loses ``r0 + (r_last - r0) * log(i + 1) / log(n)``, where r0 is the first layer's and the mean is the
    ratio.
    """

    paper: ClassVar[str] = "SlimGPT, NeurIPS 2024, arXiv 2412.18110, incremental pruning ratio"
    name: Literal["log_incremental"] = "log_incremental"
    first: float = Field(default=0.25, ge=0, le=1, description="what the first layer loses, as a share of the ratio")

    def shares(self, layers: Sequence[SiteScores], ratio: float) -> np.ndarray:
        growth = np.log(np.arange(1, len(layers) + 1)) / math.log(max(2, len(layers)))
        if len(layers) < 2:
            return np.full(len(layers), ratio)
        least = self.first * ratio
        return least + (ratio - least) / growth.mean() * growth


class OutlierShare(WeightStatistic):
    """Share of the entries of |W| * ||x|| above ``multiple`` times their mean, over all linear layers of a layer."""

    uses_inputs: ClassVar[bool] = True
    name: Literal["outlier_share"] = "outlier_share"
    multiple: float = Field(default=5.0, gt=0, description="how many times the mean an outlier exceeds")

    def measure(self, weights: Sequence[LayerWeight]) -> float:
        sums = [(weight.read().abs() * weight.norms).double().sum().item() for weight in weights]
        entries = sum(weight.read().numel() for weight in weights)
        limit = self.multiple * math.fsum(sums) / entries
        return sum(int((weight.read().abs() * weight.norms > limit).sum()) for weight in weights) / entries


class Owl(LayerShares):
    """Layers with more outliers lose less: the share of each is at most ``spread`` from the ratio, before centring.

    The outlier shares of all layers are mapped to 0 ... 2 * ``spread``, their mean is subtracted, and what is left is
    subtracted from the ratio.
    """

    paper: ClassVar[str] = "OWL, ICML 2024, arXiv 2310.05175"
    name: Literal["owl"] = "owl"
    multiple: float = Field(default=5.0, gt=0, description="how many times the mean an outlier exceeds (M)")
    spread: float = Field(default=0.08, ge=0, lt=1, description="half of the range of the shares (lambda)")

    @property
    def weight_statistic(self) -> WeightStatistic:
        return OutlierShare(multiple=self.multiple)

    def shares(self, layers: Sequence[SiteScores], ratio: float) -> np.ndarray:
        mapped = 2 * self.spread * _from_0_to_1([scores.weight_statistic for scores in layers])
        return ratio - (mapped - mapped.mean())


class InfluenceShares(LayerShares):
    """Layers that change the residual stream least lose most: a softmax of the negative block influence.

    Block influence is one minus the cosine between what enters and leaves a layer. Layer l of n loses ``n * ratio *
    softmax(-influence / temperature)``.
    """

    paper: ClassVar[str] = "MoDeGPT, ICLR 2025, arXiv 2408.09632, global sparsity allocation"
    name: Literal["block_influence"] = "block_influence"
    temperature: float = Field(default=0.015, gt=0, description="of the softmax (epsilon); larger is more equal")
    maximum: float = Field(default=0.8, gt=0, lt=1, description="largest share of its units that a layer may lose")

    @property
    def block_statistic(self) -> BlockStatistic:
        return BlockInfluence()

    def shares(self, layers: Sequence[SiteScores], ratio: float) -> np.ndarray:
        scaled = -np.array([scores.layer_statistic for scores in layers]) / self.temperature
        weights = np.exp(scaled - scaled.max())
        return len(layers) * ratio * weights / weights.sum()


class TailIndex(WeightStatistic):
    """Mean over the linear layers of the Hill estimate of the tail of the spectrum of WᵀW: small for a heavy tail.

    Of n eigenvalues the k largest are the tail: 1 + k / sum of ln(eigenvalue / the (k+1)-th largest).
    """

    name: Literal["tail_index"] = "tail_index"
    tail: float = Field(default=0.5, gt=0, lt=1, description="share of the eigenvalues that are the tail")

    def measure(self, weights: Sequence[LayerWeight]) -> float:
        return math.fsum(self._index(weight) for weight in weights) / len(weights)

    def _index(self, weight: LayerWeight) -> float:
        squares = torch.linalg.svdvals(weight.read()).double().square().sort(descending=True).values
        squares = squares.clamp(min=max(float(squares[0]) * 1e-12, 1e-30))
        count = min(max(1, int(self.tail * len(squares))), len(squares) - 1)
        logs = (squares[:count] / squares[count]).log().sum().item() if count else 0.0
        return 1 + count / max(logs, 1e-6)


class AlphaPruning(LayerShares):
    """Layers whose weights have a heavy-tailed spectrum, as trained ones have, lose less; without data.

    The tail indices of all layers are mapped to 1 - ``spread`` ... 1 + ``spread``, and scaled so that their mean is the
    ratio.
    """

    paper: ClassVar[str] = "AlphaPruning, NeurIPS 2024, arXiv 2410.10912"
    name: Literal["alpha_pruning"] = "alpha_pruning"
    spread: float = Field(default=0.3, ge=0, lt=1, description="half of the range, as a share of the ratio (epsilon)")
    tail: float = Field(default=0.5, gt=0, lt=1, description="share of the eigenvalues that are the spectrum's tail")

    @property
    def weight_statistic(self) -> WeightStatistic:
        return TailIndex(tail=self.tail)

    def shares(self, layers: Sequence[SiteScores], ratio: float) -> np.ndarray:
        place = _from_0_to_1([scores.weight_statistic for scores in layers])
        factors = 1 - self.spread + 2 * self.spread * place
        return ratio * factors / factors.mean()


def _from_0_to_1(values: Sequence[float]) -> np.ndarray:
    """Values (n,) mapped linearly to 0 for the smallest and 1 for the largest; all 0.5 where they are equal."""
    found = np.array(values, dtype=float)
    least, largest = found.min(), found.max()
    return (found - least) / (largest - least) if largest > least else np.full(len(found), 0.5)


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [LogIncremental, Owl, InfluenceShares, AlphaPruning]
