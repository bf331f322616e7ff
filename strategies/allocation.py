"""How many units every site keeps: the same share everywhere, or shares per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from ..registry import SiteKind, SiteScores, SparsityAllocator, SpecError, hookimpl


def kept_width(units: int, dropped: int, multiple: int) -> int:
    """Kept units if ``dropped`` are removed, rounded up to a multiple, at most ``units``."""
    return min(units, math.ceil((units - dropped) / multiple) * multiple)


class Uniform(SparsityAllocator):
    """The same share of units from every site, rounded down to whole units."""

    name: Literal["uniform"] = "uniform"
    mlp_multiple: int = Field(
        default=1,
        ge=1,
        description="round the kept MLP width up to a multiple of this; 64 is fast on GPUs",
    )

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        counts = []
        for scores in sites:
            units = scores.site.units
            dropped = math.floor(ratio * units + 1e-9)
            counts.append(kept_width(units, dropped, self.mlp_multiple if scores.site.kind == "mlp" else 1))
        return counts


class Explicit(SparsityAllocator):
    """A share to cut per layer, written out for attention and MLP; the strategy's ratio stays unset."""

    takes_ratio: ClassVar[bool] = False
    name: Literal["explicit"] = "explicit"
    attention: tuple[float, ...] = Field(description="share of attention units to cut, one number per layer")
    mlp: tuple[float, ...] = Field(description="share of MLP channels to cut, one number per layer")

    @field_validator("attention", "mlp")
    @classmethod
    def _ratios_in_range(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        for layer, ratio in enumerate(ratios):
            if not 0 <= ratio < 1:
                raise ValueError(f"layer {layer}: a ratio is the share that is cut, 0 <= ratio < 1; found {ratio}")
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
            counts.append(site.units - math.floor(ratios[site.layer] * site.units + 1e-9))
        self._check_places({(scores.site.layer, scores.site.kind) for scores in sites})
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
    return [Uniform, Explicit]
