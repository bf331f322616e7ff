"""A format's constraint on the numbers of kept units, applied before pruning, and its cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from ...registry import (
    BlockStatistic,
    Site,
    SiteKind,
    SiteScores,
    SparsityAllocator,
    SpecError,
    Strategy,
    WeightStatistic,
)
from ..models.exported.manifest import Rounding, ScoreKept
from ..output.formatting import share
from ..pruning.pruned import Pruned
from ..pruning.sites import sites_within


@dataclass(frozen=True)
class Constraint:
    """``equal``: the same number of units in every layer; ``multiple``: kept MLP channels are a multiple of it."""

    equal: bool = False
    multiple: int = 1

    @property
    def binds(self) -> bool:
        """Whether it constrains anything."""
        return self.equal or self.multiple > 1

    def on(self, strategy: Strategy) -> Strategy:
        """The strategy with an allocator whose counts meet the constraint.

        Raises :class:`SpecError` for equal counts with skipped layers, and for an allocator that measures.
        """
        if not self.binds or strategy.allocator.whole_blocks:  # whole blocks have the shapes that they had
            return strategy
        if strategy.allocator.measures:
            raise SpecError(
                f"allocator {strategy.allocator.name} measures the model with the counts that it chooses, so they "
                "cannot be changed afterwards; use --profile hf-hetero, whose layers may differ, and its mlp_multiple "
                "instead of --multiple, or another allocator"
            )
        if self.equal and strategy.skip_layers:
            layers = ", ".join(map(str, strategy.skip_layers))
            raise SpecError(
                f"profile hf-uniform: all layers keep the same counts, but skip_layers [{layers}] leaves some as they "
                "are; nearest: --set prune.skip_layers=[]"
                + ("" if strategy.experts == "whole" else ", or --profile hf-hetero, whose layers may differ")
            )
        rounded = RoundedCounts(allocator=strategy.allocator, equal=self.equal, multiple=self.multiple)
        return strategy.model_copy(update={"allocator": rounded})


class RoundedCounts(SparsityAllocator):
    """The counts of another allocator, made equal over layers and rounded to multiples."""

    name: Literal["rounded_counts"] = "rounded_counts"
    allocator: SparsityAllocator
    equal: bool = False
    multiple: int = Field(default=1, ge=1)

    # A class attribute of the role; here it is that of the wrapped allocator.
    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        return self.allocator.needs_scores

    @property
    def uses_scores(self) -> bool:  # type: ignore[override]
        return self.allocator.uses_scores

    @property
    def takes_ratio(self) -> bool:  # type: ignore[override]
        return self.allocator.takes_ratio

    @property
    def block_statistic(self) -> BlockStatistic | None:
        return self.allocator.block_statistic

    @property
    def weight_statistic(self) -> WeightStatistic | None:
        return self.allocator.weight_statistic

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        counts = self.allocator.allocate(sites, ratio)
        if self.equal:
            counts = _equal(sites, counts)
        return [self._rounded(s, count) for s, count in zip(sites, counts, strict=True)]

    def check_reachable(self, sites: Sequence[Site]) -> None:
        """Raise :class:`SpecError` if the multiple is larger than every MLP."""
        mlps = [site for site in sites if site.kind == "mlp"]
        if mlps and all(self.multiple > site.units for site in mlps):
            raise SpecError(
                f"--multiple {self.multiple}: {mlps[0].label} has {mlps[0].units} channels, so no smaller width is a "
                "multiple of that; choose a smaller one"
            )

    def _rounded(self, scores: SiteScores, count: int) -> int:
        """The nearest multiple, at least one; a site that keeps all units keeps all."""
        units = scores.site.units
        if scores.site.kind != "mlp" or count >= units or not count:
            return count
        self.check_reachable([scores.site])
        return min(units, max(self.multiple, (count + self.multiple // 2) // self.multiple * self.multiple))


def _equal(sites: Sequence[SiteScores], counts: Sequence[int]) -> list[int]:
    """The mean count of each kind of site, for every site of that kind that keeps anything."""
    by_kind: dict[SiteKind, list[int]] = defaultdict(list)
    for scores, count in zip(sites, counts, strict=True):
        if count:
            by_kind[scores.site.kind].append(count)
    most = {kind: min(s.site.units for s in sites if s.site.kind == kind) for kind in by_kind}
    mean = {kind: min(most[kind], max(1, round(sum(found) / len(found)))) for kind, found in by_kind.items()}
    return [mean[scores.site.kind] if count else 0 for scores, count in zip(sites, counts, strict=True)]


def rounding(pruned: Pruned) -> Rounding | None:
    """The effect of the constraint on units cut and score kept; None without a constraint.

    The kept score is the share of the strategy's calibrated scores, averaged over sites; None if only batches give
    scores.
    """
    allocator = pruned.strategy.allocator
    if not isinstance(allocator, RoundedCounts):
        return None
    scores = [pruned.calibrated_scores(cut) for cut in pruned.cuts]
    known = [found for found in scores if found is not None]
    complete = len(known) == len(scores)
    plain = [cut.state.unscored for cut in pruned.cuts]
    layers = 1 + max(site.layer for site in pruned.all_sites)
    ratio = pruned.strategy.ratio if pruned.matched is None else pruned.matched.ratio
    unrounded = pruned.strategy.model_copy(update={"allocator": allocator.allocator, "ratio": ratio})
    _, ratio = sites_within(unrounded, list(pruned.all_sites), layers)
    asked = allocator.allocator.allocate(known if complete else plain, ratio or 0.0)
    met = [cut.count for cut in pruned.cuts]
    return Rounding(
        equal=allocator.equal,
        multiple=allocator.multiple,
        asked=_effect(pruned, asked, known if complete else None),
        achieved=_effect(pruned, met, known if complete else None),
        sites_changed=sum(a != b for a, b in zip(asked, met, strict=True)),
        sites=len(met),
    )


def _effect(pruned: Pruned, counts: Sequence[int], scores: Sequence[SiteScores] | None) -> ScoreKept:
    cut = [1 - count / c.site.units for c, count in zip(pruned.cuts, counts, strict=True)]
    sites = len(pruned.all_sites)
    kept = None
    if scores is not None:
        shares = [_kept_share(s, count) for s, count in zip(scores, counts, strict=True)]
        kept = round((sum(shares) + sites - len(shares)) / sites, 6)
    return ScoreKept(units_cut=round(sum(cut) / sites, 6), score_kept=kept)


def _kept_share(scores: SiteScores, count: int) -> float:
    """The share of a site's score that its ``count`` best units have."""
    assert scores.units is not None  # calibrated scores hold values
    units = scores.units.double().clamp(min=0)
    total = float(units.sum())
    return float(units.topk(count).values.sum()) / total if total else 1.0


def sentence(found: Rounding, ratio: float | None) -> str:
    """The effect of a constraint in words."""
    what = [
        "equal counts in every layer" * found.equal,
        f"MLP widths a multiple of {found.multiple}" * (found.multiple > 1),
    ]
    before, after = found.asked, found.achieved
    asked = "" if ratio is None else f"{share(ratio)} of the units asked, "
    text = f"{' and '.join(filter(None, what))}: {asked}{share(after.units_cut)} cut"
    if not found.sites_changed:
        return f"{text}; no count had to change"
    text += f" ({share(before.units_cut)} without; {found.sites_changed} of {found.sites} counts changed)"
    if before.score_kept is not None and after.score_kept is not None:
        text += f"; {after.score_kept:.2%} of the score kept instead of {before.score_kept:.2%}"
    return text
