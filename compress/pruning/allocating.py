"""How many units every site keeps: what the allocator says, for a ratio or for a cost."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any

from ...registry import Site, SiteScores, SpecError, Strategy
from ..calibration.losses import CutLosses
from ..calibration.passes import Progress
from ..engine.engine import Engine
from ..output.records import MatchFacts
from .matching import Counts, DecoderCost, Match, is_near, nearest, unmatched
from .policies import check_grouping, check_policy
from .sites import sites_within


def allocate(
    engine: Engine,
    ratio: float | None,
    batches: list | None,
    known: MutableMapping[str, float],
    progress: Progress,
    match: Match | None,
) -> MatchFacts | None:
    """Set every site's count: for ``ratio``, or for the one whose decoder costs what ``match`` asks, which is returned.

    Raises :class:`SpecError` where no ratio has that cost.
    """
    strategy, cuts = engine.strategy, engine.cuts
    allocator: Any = strategy.allocator
    scores = [cut.state.unscored for cut in cuts]
    if allocator.needs_scores or (allocator.uses_scores and all(cut.state.has_scores for cut in cuts)):
        scores = [engine.decider.scores(cut) for cut in cuts]
    measured: list[CutLosses] = []

    def counts_at(ratio: float) -> Counts:
        own = strategy.model_copy(update={"ratio": ratio})
        share = sites_within(own, list(engine.all_sites), len(engine.layers))[1]
        return _counts(allocator, scores, share, measured)

    if allocator.measures and batches is not None:
        measured.append(CutLosses(engine, batches, known, progress))
        engine.searched = measured[0].records
    if match is None:
        found, counts = None, _counts(allocator, scores, ratio, measured)
    else:
        asked = strategy.ratio or 0.0
        found = nearest(match, DecoderCost.of(engine.model, engine.layers, engine.all_sites, match), counts_at, asked)
        if not (allocator.whole_blocks or is_near(found, asked)):  # blocks come no nearer than their size
            raise unmatched(strategy.name, found, asked)
        counts = counts_at(found.ratio)
    for cut in cuts:
        cut.state.keep(counts[cut.site.layer, cut.site.kind])
    _check(strategy, [(cut.site, cut.count) for cut in cuts])
    return found


def check_policy_beforehand(strategy: Strategy, sites: Sequence[Site], ratio: float | None) -> None:
    """Raise :class:`SpecError` for a policy or a grouping that cannot be right, where counts are known without
    calibration."""
    asks = not strategy.policy.is_plain or strategy.group_by.splits or strategy.turns == "decide"
    if asks and not strategy.allocator.looks_at_model:
        counts = _counts(strategy.allocator, [SiteScores(site) for site in sites], ratio, [])
        _check(strategy, [(site, counts[site.layer, site.kind]) for site in sites])


def _check(strategy: Strategy, counts: Sequence[tuple[Site, int]]) -> None:
    check_policy(strategy, counts)
    check_grouping(strategy, counts)


def _counts(allocator: Any, scores: Sequence[SiteScores], ratio: float | None, measured: Sequence[CutLosses]) -> Counts:
    """The allocator's counts by layer and kind; raises :class:`SpecError` where they are not those of the sites.

    ``measured``: the losses of cuts, for an allocator that measures them; else nothing.
    """
    for losses in measured:
        losses.records.clear()  # of another ratio
    counts = allocator.allocate(scores, ratio or 0.0, *measured) if scores else []
    if not isinstance(counts, Sequence):
        raise SpecError(
            f"allocator {allocator.name} returned a {type(counts).__name__}; it must return a list of a count for each "
            "site; fix the plugin"
        )
    if len(counts) != len(scores):
        raise SpecError(
            f"allocator {allocator.name} returned {len(counts)} counts for {len(scores)} sites; it must return "
            "one for each site; fix the plugin"
        )
    for each, count in zip(scores, counts, strict=True):
        if not hasattr(count, "__index__"):
            raise SpecError(
                f"allocator {allocator.name} keeps {count!r} of {each.site.units} units at {each.site.label}; it must "
                "be a whole number; fix the plugin"
            )
        if not 0 <= count <= each.site.units:
            raise SpecError(
                f"allocator {allocator.name} keeps {count} of {each.site.units} units at {each.site.label}; "
                "it must keep between 0 and all"
            )
        if count < each.site.least:
            raise SpecError(
                f"{count} of {each.site.units} experts would be left at layer {each.site.layer}, and the router "
                f"chooses {each.site.least} for every token; ask for a ratio of at most "
                f"{1 - each.site.least / each.site.units:.3g}"
            )
        if allocator.whole_blocks and 0 < count < each.site.units:
            raise SpecError(
                f"allocator {allocator.name} keeps {count} of {each.site.units} units at {each.site.label}, and says "
                "that sites keep all or nothing (whole_blocks); fix the plugin"
            )
    return {(each.site.layer, each.site.kind): int(count) for each, count in zip(scores, counts, strict=True)}
