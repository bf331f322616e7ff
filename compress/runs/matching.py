"""Prunes as a pipeline asks: at its ratio, or at the one whose decoder costs what the ratio says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...evaluators.cost import Cost, operations
from ...evaluators.parts import HEAD
from ...evaluators.passes import clamped
from ...registry import Strategy
from ...registry.tensors.tokens import context_length
from ..calibration.passes import Progress
from ..calibration.shared import SharedStatistics
from ..engine.rotary import rotary_kept
from ..files.spec import PipelineSpec
from ..models.loading import Loaded
from ..pruning.matching import Match, is_near, unmatched
from ..pruning.prune import prune
from ..pruning.pruned import Pruned
from .measuring import Measuring

TRIES = 4
"""Prunings of a strategy that probes, each with the probe's operations as the one before counted them."""


def prune_as_asked(
    spec: PipelineSpec, loaded: Loaded, strategy: Strategy, progress: Progress, **options: Any
) -> Pruned:
    """:func:`~prunekit.compress.prune` with what ``spec.match`` asks for.

    The operations of a strategy that computes more than its kept units in every batch are counted in a forward pass,
    and it is pruned again with them. Raises :class:`SpecError` where no ratio costs what was asked.
    """

    def pruned_to(match: Match | None) -> Pruned:
        return prune(loaded.model, strategy, progress=progress, match=match, **options)

    if spec.match is None:
        return pruned_to(None)
    if spec.match == "parameters":
        return pruned_to(Match("parameters"))
    batch = counted_batch(spec, context_length(loaded.model))
    match = Match("flops", clamped(batch.length, loaded.model), batch.batch_size)
    if strategy.probes_with is None:
        return pruned_to(match)
    options["statistics"] = options.get("statistics") or SharedStatistics()
    for _ in range(TRIES):
        pruned = pruned_to(match)
        try:
            match = _counted(match, batch, pruned, Measuring(loaded, pruned, progress, {}))
            if pruned.matched is not None and is_near(pruned.matched, strategy.ratio or 0.0):
                return pruned
        except BaseException:
            pruned.remove()
            raise
        pruned.remove()
    assert pruned.matched is not None  # of a pruning with a match
    raise unmatched(strategy.name, pruned.matched, strategy.ratio or 0.0)


def _counted(match: Match, batch: Cost, pruned: Pruned, subject: Measuring) -> Match:
    """``match`` with the operations that a forward pass adds to those of the kept units; updates ``pruned.matched``."""
    assert pruned.matched is not None
    cost, known = pruned.decoder_cost(match), len(pruned.trace or ())
    ids = batch.batch(subject, match.length)
    with rotary_kept(subject.model):
        parts = operations(subject, ids)
    pruned.reset()
    del (pruned.trace or [])[known:]
    counted = sum(amount for (part, _), amount in parts.items() if part != HEAD) / ids.numel()
    match = replace(match, added=counted / cost.dense - (1 - cost.lost(pruned.counts)))
    pruned.matched = match.found(cost, pruned.counts, pruned.matched.ratio)
    return match


def counted_batch(spec: PipelineSpec, context: int | None) -> Cost:
    """The batch whose operations count: that of the pipeline's ``cost``, else that of its first evaluator with rows."""
    for evaluator in spec.evaluate:
        if isinstance(evaluator, Cost):
            return evaluator
    shapes = ((getattr(each, "batch_size", None), each.longest_row(context)) for each in spec.evaluate)
    known = next(((rows, length) for rows, length in shapes if rows and length), None)
    if known is not None:
        return Cost(batch_size=known[0], length=known[1])
    return Cost(length=min(Cost().length, spec.positions or Cost().length))
