"""Before the first batch: sites learn from calibration, get their counts, and choose what is chosen once."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ...registry import (
    ChannelHistory,
)
from ..calibration.blocks import describe_blocks
from ..calibration.covariance import check_layers, choose, finalize, gather_covariances, order_units
from ..calibration.experts import score_unreached
from ..calibration.fitting import Fits, fit_scorer
from ..calibration.gradients import gather_gradients
from ..calibration.passes import (
    Progress,
    calibrate,
    calibrate_sequentially,
    one_bar,
)
from ..calibration.shared import SharedStatistics, SomeMoments
from ..calibration.statistics_file import StatisticsFile
from ..calibration.streams import ResidualStreams
from ..calibration.weights import describe_weights
from ..calibration.zeroing import Dropped, channels_without, zeroed
from ..engine.batch import Decision
from ..engine.engine import Engine
from ..engine.learning import calibrate as learn_statistics
from ..engine.site_cut import SiteCut
from ..output.records import MatchFacts
from .allocating import allocate
from .matching import Match


def decide(
    engine: Engine,
    ratio: float | None,
    batches: list | None,
    progress: Progress,
    statistics: SharedStatistics | StatisticsFile | None,
    match: Match | None,
) -> MatchFacts | None:
    """Calibrate, set every site's count, and let strategies that decide once decide."""
    strategy, allocator = engine.strategy, engine.strategy.allocator
    known = SomeMoments(0)
    if batches is not None and statistics is not None and strategy.compensate.covariance_parts == 1:
        known = statistics.moments(batches)
    numbers: AbstractContextManager[MutableMapping[str, float]] = nullcontext({})
    looks = allocator.measures or allocator.block_statistic is not None or allocator.weight_statistic is not None
    if looks and statistics is not None and batches is not None:
        numbers = statistics.measured(engine, batches)
    *earlier, _ = strategy.schedule(ratio or 0.0)
    with numbers as measured:
        with one_bar(progress, 1 + len(earlier)) as in_steps:
            if batches is not None:
                _learn(engine, batches, progress, in_steps, statistics, known)
                describe_blocks(engine, batches, measured, progress)
            describe_weights(engine, batches, measured, progress)
            for target in earlier:
                allocate(engine, target, batches, measured, progress, None)
                if batches is not None:
                    _learn_again(engine, batches, in_steps)
                    score_unreached(engine.cuts)
        found = allocate(engine, ratio, batches, measured, progress, match)
    if strategy.sequential and batches is not None:
        _decide_by_layer(engine, batches, progress)
        return found
    for cut in engine.cuts:
        if not strategy.dynamic or not cut.count:
            _fix(engine, cut)
    if batches is not None and strategy.compensate.needs_covariance:
        gather_covariances(engine, batches, progress, known)
    return found


def _learn(
    engine: Engine,
    batches: list,
    progress: Progress,
    in_steps: Progress,
    statistics: SharedStatistics | StatisticsFile | None,
    known: SomeMoments,
) -> None:
    """Fill every site with what the dense model shows: what its scorer reads, and the means that compensation needs.

    ``in_steps`` is the progress of what is repeated where units are chosen in several steps. ``known``: covariances.
    """
    strategy = engine.strategy
    if strategy.scores_gradients and not strategy.allocator.whole_blocks:
        gather_gradients(engine, batches, in_steps, {} if statistics is None else statistics.gradients(batches))
        if not strategy.compensates and not isinstance(statistics, StatisticsFile):
            return
    elif strategy.fits and not strategy.allocator.whole_blocks:
        kept: AbstractContextManager[Fits] = nullcontext({})
        with kept if statistics is None else statistics.fits(engine, batches) as fits:
            fit_scorer(engine, batches, in_steps, fits)
    else:
        progress = in_steps
    if strategy.sequential and not strategy.allocator.needs_scores:
        return
    if strategy.calibrates_channels and statistics is not None:
        statistics.calibrate(engine, batches, progress)
    elif strategy.calibrates_channels:
        calibrate(engine, batches, progress)
    if strategy.calibrates_channels:
        score_unreached(engine.cuts)
    if strategy.chooser is not None and not strategy.allocator.whole_blocks:
        order_units(engine, batches, progress, known)


def _learn_again(engine: Engine, batches: list, progress: Progress) -> None:
    """Fill every site with what its scorer reads in the model with dropped units zero; means stay the dense ones."""
    dropped: Dropped = {
        cut: channels_without(cut, engine.decider.calibrated_units(cut)) if cut.count else None
        for cut in engine.cuts
        if not cut.whole
    }
    dense = [cut.history for cut in engine.cuts]
    with zeroed(dropped):
        if engine.strategy.scores_gradients:
            gather_gradients(engine, batches, progress, {})
            return
        if engine.strategy.fits:
            fit_scorer(engine, batches, progress, {})
            if engine.strategy.scorer.statistic is None:
                return
        for cut in engine.cuts:
            cut.state.replace_history(ChannelHistory(cut.site.channels, cut.history.device))
        calibrate(engine, batches, progress)
    for cut, history in zip(engine.cuts, dense, strict=True):
        cut.state.replace_history(replace(cut.history, mean=history.mean, tokens=history.tokens))


def _decide_by_layer(engine: Engine, batches: list, progress: Progress) -> None:
    """Calibrate, choose, cut and compensate layer after layer, with the counts that sites have."""
    strategy, cuts = engine.strategy, engine.cuts
    dense: dict[SiteCut, Tensor] = {}
    """What enters a site's consumer in the dense model, for the batch that passes now; where its residual stream is
    fitted, with that."""
    streams = ResidualStreams(engine) if strategy.compensate.fits_dense_stream else None
    for cut in cuts:  # statistics of the dense model have served the allocator
        cut.state.replace_history(ChannelHistory(cut.site.channels, cut.history.device))

    def learn_dense(cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        if not cut.whole:
            dense[cut] = x if streams is None else streams.beside(cut, x)

    def learn(cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        learn_statistics(cut.state, x, valid)
        if strategy.needs_covariance and not cut.whole:
            known = dense.pop(cut, None)
            cut.compensation.learn(x, valid, known if streams is None or known is None else streams.lag(cut, known))

    def decide_layer(layer: int) -> None:
        score_unreached([cut for cut in cuts if cut.site.layer == layer])
        for cut in cuts:
            if cut.site.layer == layer:
                if not cut.whole:
                    choose(engine, cut)
                _fix(engine, cut)
                if strategy.compensate.needs_covariance and not cut.whole:
                    finalize(engine, cut)
                cut.compensation.forget()

    if strategy.needs_covariance:
        check_layers(cuts)
    fits_dense = strategy.compensate.fits_dense_outputs
    with streams or nullcontext():
        calibrate_sequentially(engine, batches, learn, decide_layer, progress, learn_dense if fits_dense else None)


def _fix(engine: Engine, cut: SiteCut) -> None:
    """Decide once for a site, by its calibrated scores."""
    kept = engine.decider.calibrated_units(cut)
    nothing = torch.empty(0, dtype=torch.int64)
    engine.hooks.record(cut, Decision(kept, nothing, nothing), None)
    if not cut.whole:
        cut.state.fix(kept)
        if engine.strategy.sequential:
            cut.open(kept, stays=True)
