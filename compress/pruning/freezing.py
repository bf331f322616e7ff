"""One cut for all batches, made of the decisions that a dynamic strategy takes batch by batch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...registry import DataError, SpecError, near
from ..calibration.passes import Progress, calibration_list, evaluating, run_batch
from ..engine.decider import keep_highest
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut

Freeze = Literal["mean-score", "last", "calibration"]

MEANINGS = {
    "mean-score": "the units whose score is highest on average over the calibration batches",
    "last": "what the last calibration batch kept",
    "calibration": "what the calibrated history alone would keep, without any probe",
}
"""What each way of freezing keeps."""


def frozen_units(engine: Engine, how: Freeze, batches: Iterable[Any] | None, progress: Progress) -> list[Tensor]:
    """The units (k,) int64 ascending that every site of a dynamic strategy is to keep from now on.

    ``mean-score`` and ``last`` run ``batches`` through the pruned model. A site that decides once keeps its units. A
    routed expert that no token reaches keeps what its history, or its weights, would keep.
    Raises :class:`SpecError` for an unknown way or one that this strategy has nothing for, :class:`DataError` where
    batches are missing.
    """
    check_freeze(how)
    merger = engine.strategy.merger
    if merger is None:
        return [_all(cut) if cut.fixed is None else cut.fixed for cut in engine.cuts]
    if how == "calibration":
        if not merger.uses_history:
            raise SpecError(
                f"freeze: merger {merger.name} uses no history, so calibration alone keeps nothing; "
                "use mean-score or last"
            )
        with torch.no_grad():
            return [_all(cut) if cut.whole else engine.decider.calibrated_units(cut) for cut in engine.cuts]
    if how == "last" and engine.strategy.group_by.splits:
        raise SpecError(
            f"freeze: last keeps what the last batch kept, and with group_by: {engine.strategy.group_by.name} its rows "
            "kept different units; use mean-score"
        )
    if batches is None:
        raise DataError(f"freeze: {how} runs batches through the pruned model; give it calibration batches")
    sums: dict[SiteCut, Tensor] = {}

    def add(cut: SiteCut, scores: Tensor) -> None:
        sums[cut] = sums[cut] + scores.double() if cut in sums else scores.double()

    for cut in engine.cuts:
        cut.computed = None  # of earlier texts
    listed = calibration_list(batches)
    watching = engine.decider.watched(add) if how == "mean-score" else nullcontext()
    with watching, evaluating(engine.model):
        for batch in progress(listed, "freezing", len(listed)):
            run_batch(engine, batch)
    if how == "mean-score":
        found = {cut: keep_highest(scores, cut.count) for cut, scores in sums.items()}
    else:
        found = {cut: cut.computed for cut in engine.cuts if cut.computed is not None}
    with torch.no_grad():  # what no token of the batches has reached, such as a routed expert, has decided nothing
        rest = [cut for cut in engine.cuts if not cut.whole and cut not in found]
        found |= {cut: engine.decider.unprobed_units(cut) for cut in rest}
    return [_all(cut) if cut.whole else found[cut] for cut in engine.cuts]


def check_freeze(how: str) -> None:
    """Raise :class:`SpecError` for a way to freeze that does not exist."""
    ways = get_args(Freeze)
    if how not in ways:
        raise SpecError(f"freeze: unknown way {how!r}{near(how, ways)}; there are {', '.join(ways)}")


def _all(cut: SiteCut) -> Tensor:
    return torch.arange(cut.site.units, device=cut.history.device)
