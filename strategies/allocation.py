"""How many units every site keeps: the same share everywhere, or shares per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ..registry import Site, SiteGroup, SiteKind, SiteScores, SparsityAllocator, SpecError, hookimpl

GROUPS: tuple[SiteGroup, ...] = ("attention", "mlp", "expert", "experts")

EXACT = 1e-9
"""Shares this close to a whole number of units are whole: 0.3 * 10 is not below 3."""


def kept_width(units: int, dropped: int, multiple: int) -> int:
    """Kept units if ``dropped`` are removed, rounded up to a multiple, at most ``units``."""
    return min(units, math.ceil((units - dropped) / multiple) * multiple)


class Uniform(SparsityAllocator):
    """The same share of units from every site; with the largest remainders the model loses the ratio, within one unit.

    Every site drops the whole units of its share. Then sites drop one more until the sites of a kind (attention, MLP,
    routed expert)
    together have lost the ratio: those with the largest remainders, and of equal ones those whose next unit has the
    smallest share of the site's scores. Where there are no scores before the cut (``sequential``, or no calibration),
    they are spread evenly over depth. Every site keeps a unit.

    With few key/value groups, ``rounding: to_channels`` is better at the same number of parameters
    (docs/results/real-model).
    """

    uses_scores: ClassVar[bool] = True
    name: Literal["uniform"] = "uniform"
    rounding: Literal["largest_remainder", "to_channels", "down"] = Field(
        default="largest_remainder",
        description="largest_remainder meets the ratio over all sites of a kind; to_channels drops only the whole "
        "heads of each site's share, and as many more MLP channels as the parameters of the ratio need; down drops "
        "only the whole units of each site's share, so that sites with few units lose less",
    )
    mlp_multiple: int = Field(
        default=1,
        ge=1,
        description="kept MLP widths are multiples of this, rounding: down rounds them up; 64 is fast on GPUs",
    )

    def granularity(self, site: Site) -> int:
        return self.mlp_multiple if site.group in ("mlp", "expert") else 1

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        """Kept units of every site; raises :class:`SpecError` where channels cannot make up for whole heads."""
        counts, share = [scores.site.units for scores in sites], ratio
        for kind in GROUPS:
            meets = self.rounding == "largest_remainder" or (kind != "attention" and self.rounding != "down")
            places = [place for place, scores in enumerate(sites) if scores.site.group == kind]
            if kind == "mlp" and self.rounding == "to_channels":
                share = _left_to_channels([scores.site for scores in sites], counts, ratio)
            here = [sites[place] for place in places]
            multiple = self.granularity(here[0].site) if here else 1
            kept = [_rounded_up(scores.site.units, share, multiple) for scores in here]
            if meets:
                kept = apportioned(here, [share] * len(here), multiple)
            for place, count in zip(places, kept, strict=True):
                counts[place] = count
        return counts


class MlpOnly(SparsityAllocator):
    """The same share of channels from every MLP; attentions stay whole. The ratio is a share of the channels."""

    uses_scores: ClassVar[bool] = True
    spares: ClassVar[tuple[SiteGroup, ...]] = ("attention",)
    name: Literal["mlp_only"] = "mlp_only"
    mlp_multiple: int = Field(default=1, ge=1, description="kept MLP widths are multiples of this, rounded up")

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        rounding: Literal["largest_remainder", "down"] = "largest_remainder" if self.mlp_multiple == 1 else "down"
        uniform = Uniform(rounding=rounding, mlp_multiple=self.mlp_multiple)
        others = iter(uniform.allocate([s for s in sites if s.site.group not in self.spares], ratio))
        return [s.site.units if s.site.group in self.spares else next(others) for s in sites]


def _left_to_channels(sites: Sequence[Site], counts: Sequence[int], ratio: float) -> float:
    """The share of their channels that MLPs must lose, heads having ``counts``, so that all sites lose the ratio.

    Raises :class:`SpecError` where that is all of them or more.
    """
    total = sum(site.units * site.unit_parameters for site in sites)
    of_heads = sum((site.units - count) * site.unit_parameters for site, count in zip(sites, counts, strict=True))
    of_mlps = sum(site.units * site.unit_parameters for site in sites if site.group != "attention")
    left = ratio * total - of_heads
    if left > 0 and left >= of_mlps:
        raise SpecError(
            f"allocator uniform, rounding: to_channels: whole heads make {of_heads / total:.3g} of these layers' "
            f"parameters, and the channels of their MLPs cannot make up for the rest of {ratio:.4g}; lower the ratio, "
            "or use rounding: largest_remainder"
        )
    return max(left, 0) / of_mlps if of_mlps else 0.0


def _rounded_up(units: int, ratio: float, multiple: int) -> int:
    """Kept units where only the whole units of the share are dropped."""
    return kept_width(units, math.floor(ratio * units + EXACT), multiple)


def apportioned(sites: Sequence[SiteScores], shares: Sequence[float], multiple: int = 1) -> list[int]:
    """Kept units where every site loses the whole units of its share, and those with the largest remainders one step
    (``multiple`` units) more, until all sites together lose their shares."""
    most = [_rounded_up(scores.site.units, share, multiple) for scores, share in zip(sites, shares, strict=True)]
    counts = list(most)
    exact = [scores.site.units * (1 - share) for scores, share in zip(sites, shares, strict=True)]
    lower = [max(multiple, (count - 1) // multiple * multiple) for count in most]
    steps = [count - least for count, least in zip(most, lower, strict=True)]
    left = sum(most) - sum(exact)

    def remainder(place: int) -> tuple[float, int]:
        return round((most[place] - exact[place]) / steps[place], 9), steps[place]

    open_places = [place for place, step in enumerate(steps) if step > 0 and most[place] > exact[place] + EXACT]
    for (_, step), group in groupby(sorted(open_places, key=remainder, reverse=True), remainder):
        alike = sorted(group)
        number = max(0, min(len(alike), math.floor(left / step + 0.5 + EXACT)))
        left -= number * step
        if all(len(sites[place].units) for place in alike):
            alike.sort(key=lambda place: _share_of_next(sites[place], most[place], lower[place]))
            chosen = alike[:number]
        else:
            chosen = [alike[position] for position in evenly_spread(number, len(alike))]
        for place in chosen:
            counts[place] = lower[place]
    return counts


def _share_of_next(scores: SiteScores, kept: int, lower: int) -> float:
    """The share of a site's total score that goes if it keeps ``lower`` instead of ``kept`` units."""
    units = scores.units.double().clamp(min=0).sort(descending=True).values
    total = float(units.sum())
    return float(units[lower:kept].sum()) / total if total else 0.0


def evenly_spread(number: int, places: int) -> list[int]:
    """``number`` of ``places`` positions at equal distances, as a line is drawn on a grid (Bresenham), ascending."""
    steps = [(2 * place * number + places) // (2 * places) for place in range(places + 1)]
    return [place for place in range(places) if steps[place + 1] > steps[place]]


class Explicit(SparsityAllocator):
    """A share to cut per layer, written out for attention and MLP; the ratio stays unset. 1 removes the block."""

    takes_ratio: ClassVar[bool] = False
    name: Literal["explicit"] = "explicit"
    attention: tuple[float, ...] = Field(description="share of attention units to cut, one number per layer")
    mlp: tuple[float, ...] = Field(
        description="share of MLP channels to cut, those of routed experts too, one number per layer"
    )

    @field_validator("attention", "mlp")
    @classmethod
    def _ratios_in_range(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        for layer, ratio in enumerate(ratios):
            if not 0 <= ratio <= 1:
                raise ValueError(f"layer {layer}: a ratio is the share that is cut, 0 <= ratio <= 1; found {ratio}")
        return ratios

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        counts = []
        for scores in sites:
            site = scores.site
            ratios = self.attention if site.kind == "attention" else self.mlp
            if site.layer >= len(ratios):
                raise SpecError(
                    f"allocator explicit: {site.kind} lists {len(ratios)} layers, "
                    f"but the model has a layer {site.layer}"
                )
            counts.append(site.units - math.floor(ratios[site.layer] * site.units + EXACT))
        groups = ((scores.site.layer, scores.site.group) for scores in sites)
        self._check_places({(layer, "attention" if group == "attention" else "mlp") for layer, group in groups})
        return counts

    def _check_places(self, present: set[tuple[int, SiteKind]]) -> None:
        """Raise :class:`SpecError` for a share above 0 at a layer that is not among the pruned ones, ``present``."""
        for kind, ratios in (("attention", self.attention), ("mlp", self.mlp)):
            for layer, ratio in enumerate(ratios):
                if ratio and (layer, kind) not in present:
                    raise SpecError(
                        f"allocator explicit: {kind} names {ratio} for layer {layer}, which the model does not have or "
                        "which is skipped; write 0 there"
                    )


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [Uniform, MlpOnly, Explicit]
