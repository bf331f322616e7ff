"""Updates of histories: by a calibration batch at once, by a pruned batch after it has passed.

In a pruned batch the input of every consumer is observed. The updated history waits with the batch, and is written
when the whole batch has passed: a batch that fails changes no history. Letters: B rows, T positions, C
channels, c kept ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ...registry import HistoryMerger, Statistic, Strategy
from .batch import LEARNT, Batch, FiniteChecks
from .probing import Prober
from .runtime import Stages
from .shapes import checked
from .site_cut import SiteCut
from .site_state import SiteState


def calibrate(state: SiteState, x: Tensor, valid: Tensor | None, every_mean: bool = False) -> None:
    """Add a calibration batch of consumer input x (B, T, C) to the site's history.

    ``every_mean``: keep the channels' mean even where this strategy does not need it.
    """
    statistic = state.statistic
    if statistic is not None:
        statistic.observe(state.history, x, valid)
    if (state.compensation.wanted or every_mean) and (statistic is None or not statistic.tracks_mean):
        state.history.observe_mean(x, valid)


class Learner:
    """Updates the histories of a strategy that decides per batch."""

    def __init__(self, strategy: Strategy, merger: HistoryMerger, statistic: Statistic, stages: Stages):
        self.strategy, self.merger, self.statistic, self.stages = strategy, merger, statistic, stages
        self._extends = strategy.long_prompts == "extend"

    @classmethod
    def of(cls, strategy: Strategy, stages: Stages) -> Learner | None:
        """The learner of a strategy; None where no batch changes its histories."""
        merger, statistic = strategy.merger, strategy.scorer.statistic
        if merger is None or statistic is None or not (merger.uses_history and merger.updates):
            return None
        return cls(strategy, merger, statistic, stages)

    def observe(
        self, cut: SiteCut, columns: Tensor, x: Tensor, valid: Tensor | None, checks: FiniteChecks
    ) -> tuple[Tensor, Tensor] | None:
        """The computed channels (c,), and what history becomes there (T, c), after a batch x (B, T, c or C); None: it
        stays what it is. valid (B, T) bool: the real tokens; None where all are. Where ``columns`` are (B, c), each
        row has computed its own channels."""
        with self.stages.history:
            history, length = cut.state.history, x.shape[1]
            if self._extends and length > history.positions:  # nothing is stored of further positions
                length = history.positions
                x, valid = x[:, :length], None if valid is None else valid[:, :length]
            counts: Tensor | None
            if columns.dim() == 2:
                columns, observed, counts = self._measured_apart(columns, x, valid, history.mean)
            else:
                if x.shape[-1] != len(columns):
                    x = x.index_select(2, columns)
                observed, counts = self._measured(columns, x, valid, history.mean)
            known = history.of_columns(length, columns)
            if counts is None and not history.is_plain:
                counts = observed.new_full((length,), x.shape[0])
            if counts is not None:
                observed, counts = history.storage.pooled(observed, counts)
            updated = self.merger.update(known, observed)
            if updated is None:
                return None
            checked(updated, known.shape, "update", "history merger", self.merger, cut.binding.site)
            if counts is not None:
                # What is padding in every row that computes it keeps its history.
                updated = torch.where((counts > 0).view(len(counts), -1), updated, known)
            checks.add(updated, LEARNT, cut.binding.site)
            return columns, updated

    def _measured(
        self, columns: Tensor, x: Tensor, valid: Tensor | None, mean: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The statistic of rows x (B, T, c), and how many tokens it counts at each position (T,); None: all rows."""
        observed = self.strategy.measure(self.statistic, x, valid, None if mean is None else mean[columns])
        counted = None if valid is None else self.strategy.counted(valid)
        return observed, None if counted is None else counted.sum(0).float()

    def _measured_apart(
        self, columns: Tensor, x: Tensor, valid: Tensor | None, mean: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All computed channels, the mean of their rows' statistics (T, c), and how many tokens it counts (T, c).

        x (B, T, .): the channels ``columns`` (B, .) of each row.
        """
        united, place = columns.unique(return_inverse=True)
        totals, tokens = (x.new_zeros(x.shape[1], len(united), dtype=torch.float32) for _ in range(2))
        for row in range(len(columns)):
            own = None if valid is None else valid[row : row + 1]
            observed, counts = self._measured(columns[row], x[row : row + 1], own, mean)
            counts = observed.new_ones(len(observed)) if counts is None else counts
            totals.index_add_(1, place[row], observed * counts[:, None])
            tokens.index_add_(1, place[row], counts[:, None].expand_as(observed))
        return united, totals / tokens.clamp(min=1), tokens


def commit(batch: Batch, cuts: Sequence[SiteCut], stages: Stages, prober: Prober | None = None) -> None:
    """Write what a batch that has passed leaves to the next ones: updated histories, and the state of random draws.

    Raises :class:`NonFiniteError`, and writes nothing, for a batch that was not finite.
    """
    learnt = [(cut, at_site.learnt) for cut, at_site in zip(cuts, batch.sites, strict=True) if at_site.learnt]
    with stages.history if learnt else nullcontext():
        batch.checks.run()
        try:
            _write(learnt, batch, prober)
        except BaseException:  # interrupted between two sites: what a batch leaves belongs together
            _write(learnt, batch, prober)
            raise


def _write(learnt: Sequence[tuple[SiteCut, tuple[Tensor, Tensor]]], batch: Batch, prober: Prober | None) -> None:
    for cut, (columns, updated) in learnt:
        cut.state.history.write(columns, updated)
    if prober is not None and batch.generator is not None:
        prober.generator = batch.generator
