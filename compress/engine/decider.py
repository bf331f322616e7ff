"""What to keep: scores of a site from its history and, for dynamic strategies, from a probe of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...registry import DataError, SiteScores, SpecError, Strategy, position_sums
from .finite_checks import LEARNT, PROBED, SCORES, FiniteChecks, not_finite
from .probing import SiteInput, pick_tokens, probe_states
from .records import Decision
from .site_cut import SiteCut
from .watching import NOBODY, Stages


class Decider:
    """Runs a strategy's components on one site at a time; its only state is a random generator."""

    def __init__(self, strategy: Strategy, stages: Stages | None = None):
        self.strategy = strategy
        self.stages = stages or Stages()
        self.finite = FiniteChecks()
        self.seen: Callable[[SiteCut, Tensor], None] | None = None
        """Is shown the units' scores (U,) of every decision that a probe makes."""
        self.probe_valid: Tensor | None = None
        """Real tokens (b, t) of the probe that is running, where the batch has padding."""
        self.generator = torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Draw from the start again."""
        self.generator.manual_seed(self.strategy.seed)

    @property
    def learns(self) -> bool:
        """Whether history changes with what batches show."""
        merger = self.strategy.merger
        return merger is not None and merger.uses_history and merger.updates

    # Statistics

    def calibrate(self, cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        """Take a calibration batch of consumer input x (B, T, C) into the site's history."""
        statistic = cut.scorer.statistic
        if statistic is not None:
            statistic.observe(cut.history, x, valid)
        if (cut.compensation.wanted or cut.wants_mean) and (statistic is None or not statistic.tracks_mean):
            cut.history.observe_mean(x, valid)

    def learn(self, cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        """Have the history of the kept channels updated with what the whole batch showed; x (B, T, c or C).

        The update waits in ``cut.pending`` until :meth:`commit`, so that a batch that fails half way teaches nothing.
        """
        if len(cut.kept):
            with self.stages("history"):
                self._learn(cut, x, valid)

    def _learn(self, cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        columns, history, length = cut.weights.columns, cut.history, x.shape[1]
        if x.shape[-1] != len(columns):
            x = x.index_select(2, columns)
        observed, known = self._measure(cut, x, valid, columns), history.of_columns(length, columns)
        counted = self.strategy.counted(valid)
        counts = observed.new_full((length,), x.shape[0]) if counted is None else counted.sum(0).float()
        observed, counts = history.storage.pooled(observed, counts)
        updated = cut.merger.update(known, observed)
        if counted is not None:
            # A position where every row is padding has shown nothing.
            updated = torch.where((counts > 0)[:, None], updated, known)
        cut.pending = columns, updated
        self.finite.add(updated, LEARNT, cut.site)

    def commit(self, cuts: list[SiteCut]) -> None:
        """Take over what sites have learnt from a batch; raises :class:`NonFiniteError` and forgets it all if NaN."""
        learnt = [(cut, *cut.pending) for cut in cuts if cut.pending is not None]
        try:
            with self.stages("history") if learnt else NOBODY:
                self.finite.settle()
                for cut, columns, updated in learnt:
                    cut.history.write(columns, updated)
        finally:
            self.forget(cuts)

    def forget(self, cuts: list[SiteCut]) -> None:
        """Drop what waits to be learnt and to be checked."""
        self.finite.forget()
        for cut in cuts:
            cut.pending = None

    def _measure(self, cut: SiteCut, x: Tensor, valid: Tensor | None, columns: Tensor | None = None) -> Tensor:
        mean = cut.history.mean
        if mean is not None and columns is not None:
            mean = mean[columns]
        return self.strategy.measure(cut.scorer.statistic, x, valid, mean)

    # Decisions

    def scores(self, cut: SiteCut) -> SiteScores:
        """Scores of a site by its calibrated history, or by its weights alone."""
        statistic = None if cut.scorer.statistic is None else cut.history.summed()
        channels = self._channel_scores(cut, statistic)
        if not bool(torch.isfinite(channels).all()):
            raise not_finite(SCORES, cut.site)
        return SiteScores(cut.site, channels, self._unit_scores(cut, channels))

    def usual(self, cut: SiteCut) -> Tensor:
        """The units (k,) that a site would keep by its calibrated history alone."""
        return keep_highest(self.scores(cut).units, cut.count)

    @torch.no_grad()
    def decide(self, cut: SiteCut, given: SiteInput) -> Decision:
        """Probe a batch and decide.

        A site whose cut was made once keeps its units: there the probe serves compensation alone.
        """
        strategy, merger, valid = self.strategy, cut.merger, given.valid
        selector, uses_mean = strategy.probes_with, cut.compensation.compensator.uses_probe
        with self.stages("select"):
            rows, positions = selector.select(
                given.states(cut, selector.looks_at), strategy.counted(valid), self.generator
            )
        measured = mean = None
        if uses_mean or (merger is not None and merger.uses_probe):
            self.probe_valid = None if valid is None else pick_tokens(valid, rows, positions)
            try:
                with self.stages("probe"):
                    x = probe_states(cut, given, rows, positions, strategy.mask_positions(positions))
                    x = x.view(len(rows), positions.shape[-1], -1)
                    if merger is not None and merger.uses_probe:
                        measured = self._measure_probe(cut, x, self.probe_valid, positions)
                    mean = self._mean_of(cut, x, self.probe_valid) if uses_mean else None
            finally:
                self.probe_valid = None
        if merger is None:
            return Decision(cut.fixed, rows, positions, mean)
        self._check_length(cut, given.residual.shape[1])
        with self.stages("score"):
            history = None
            if merger.uses_history:
                history = cut.history.at(positions.reshape(-1))
            merged = merger.merge(measured, history, cut.site)
            if valid is not None and positions.dim() == 2:
                # Where every row has positions of its own, one that holds padding stands for nothing.
                merged = merged.masked_fill(~pick_tokens(valid, rows, positions).reshape(-1, 1), 0)
            statistic = merged.sum(0)
            scores = self._channel_scores(cut, statistic)
            self.finite.add(scores, SCORES, cut.site)
            units = self._unit_scores(cut, scores)
            if self.seen is not None:
                self.seen(cut, units)
            return Decision(keep_highest(units, cut.count), rows, positions, mean)

    def _measure_probe(self, cut: SiteCut, x: Tensor, valid: Tensor | None, positions: Tensor) -> Tensor:
        """The statistic of a probe x (b, t, C) position by position, (t, C); of one whose rows have positions (b, t)
        of their own token by token, (b*t, C)."""
        if positions.dim() == 1:
            return self._measure(cut, x, valid)
        valid = None if valid is None else valid.reshape(1, -1)
        return self._measure(cut, x.reshape(1, -1, x.shape[-1]), valid)

    def _mean_of(self, cut: SiteCut, x: Tensor, valid: Tensor | None) -> Tensor:
        """The channels' mean over the probe's real tokens; x (b, t, C) -> (C,) float32."""
        total, counts = position_sums(x, valid)
        mean = total.sum(0) / counts.sum().clamp(min=1)
        self.finite.add(mean, PROBED, cut.site)
        return mean

    def compared_scores(self, cut: SiteCut) -> SiteScores:
        """:meth:`scores` on the CPU, where an allocator may compare those of sites on different devices."""
        scores = self.scores(cut)
        return SiteScores(cut.site, scores.channels.cpu(), scores.units.cpu())

    def _channel_scores(self, cut: SiteCut, statistic: Tensor | None) -> Tensor:
        cut.prepare()
        scores = cut.scorer.score(cut.prepared, statistic)
        _check_shape(cut, "score", scores, cut.site.channels)
        return scores

    def _unit_scores(self, cut: SiteCut, channels: Tensor) -> Tensor:
        units = cut.scorer.unit_scores(channels, cut.site.unit_size)
        _check_shape(cut, "unit_scores", units, cut.site.units)
        return units

    def _check_length(self, cut: SiteCut, length: int) -> None:
        if cut.merger.uses_history and length > cut.history.positions:
            raise DataError(
                f"a batch of {length} positions is longer than the history, which calibration filled for "
                f"{cut.history.positions}; calibrate with sequences of at least {length} tokens, or cut the batch"
            )


def _check_shape(cut: SiteCut, method: str, scores: Tensor, expected: int) -> None:
    if tuple(scores.shape) != (expected,):
        raise SpecError(
            f"{cut.site.label}: {method} of scorer {cut.scorer.name} gave shape {tuple(scores.shape)}, expected "
            f"({expected},); mend the plugin"
        )


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` units with the highest scores; (U,) -> (count,) int64 ascending."""
    return scores.topk(count).indices.sort().values
