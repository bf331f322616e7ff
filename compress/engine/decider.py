"""Chooses the units to keep: by a site's history alone, or per batch by the history and a probe of the batch.

Letters: B rows, T positions, C channels, U units; b, t: the probe's rows and positions; k kept units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...registry import DataError, SiteScores, Strategy
from .batch import SCORES, Decision, not_finite
from .probing import Probe, SiteInput, pick_tokens
from .runtime import Stages
from .shapes import checked
from .site_cut import SiteCut
from .site_state import SiteState


class Decider:
    """Scores sites, and keeps the units with the highest scores."""

    def __init__(self, strategy: Strategy, stages: Stages):
        self.strategy, self.stages = strategy, stages
        self._extends = strategy.long_prompts == "extend"
        self._watcher: Callable[[SiteCut, Tensor], None] | None = None

    @contextmanager
    def watched(self, watcher: Callable[[SiteCut, Tensor], None]) -> Iterator[None]:
        """A context in which ``watcher`` gets the units' scores (U,) of every decision made per batch."""
        self._watcher = watcher
        try:
            yield
        finally:
            self._watcher = None

    def scores(self, cut: SiteCut) -> SiteScores:
        """Scores of a site by its calibrated history, or by its weights alone; on the CPU, where those of sites on
        different devices can be compared."""
        channels, units = self._calibrated(cut)
        copied, of_units = (each.to("cpu", copy=True) for each in (channels, units))  # allocators may write to them
        return replace(cut.state.unscored, channels=copied, units=of_units)

    def calibrated_units(self, cut: SiteCut) -> Tensor:
        """The units (k,) that a site would keep by its calibrated history alone."""
        if not cut.count or (cut.whole and not cut.state.has_scores):
            return torch.arange(cut.count, device=cut.history.device)
        return keep_highest(self._calibrated(cut)[1], cut.count)

    def unprobed_units(self, cut: SiteCut) -> Tensor:
        """The units (k,) that a site keeps whose probe has no token: by its history, or by weights alone."""
        merger = self.strategy.merger
        if merger is None or merger.uses_history:
            return self.calibrated_units(cut)
        statistic = torch.ones(cut.binding.site.channels, device=cut.state.history.device)
        return keep_highest(self._scored(cut.state, statistic)[1], cut.count)

    def _calibrated(self, cut: SiteCut) -> tuple[Tensor, Tensor]:
        state = cut.state
        if state.choice is not None:
            return state.choice.channels, state.choice.units
        channels, units = self._scored(state, state.calibrated)
        if not bool(torch.isfinite(channels).all()):
            raise not_finite(SCORES, cut.site)
        return channels, units

    @torch.no_grad()
    def decide(self, cut: SiteCut, given: SiteInput, probe: Probe) -> Decision:
        """Merge the probe's statistic with history, score the units, and keep the highest."""
        with self.stages.score:
            kept = self.chosen(cut, self.units(cut, given, probe))
        return Decision(kept, probe.rows, probe.positions, probe.mean)

    def chosen(self, cut: SiteCut, units: Tensor) -> Tensor:
        """The units (k,) with the highest scores (U,)."""
        if self._watcher is not None:
            self._watcher(cut, units)
        return keep_highest(units, cut.state.count)

    def units(self, cut: SiteCut, given: SiteInput, probe: Probe) -> Tensor:
        """The units' scores (U,) by the probe's statistic and history."""
        merger, state, positions = self.strategy.merger, cut.state, probe.positions
        assert merger is not None  # without one the units are decided once
        length, filled = given.start + given.residual.shape[1], state.history.positions
        if merger.uses_history and cut.binding.site.expert is None and length > filled and not self._extends:
            raise DataError(
                f"a batch of {length} positions is longer than the history, which calibration filled for {filled}; "
                f"calibrate with sequences of at least {length} tokens, cut the batch, or set long_prompts: extend"
            )
        history, places = None, positions.reshape(-1) + given.start
        if merger.uses_history:
            history = state.history.extended_at(places) if length > filled else state.history.at(places)
        if probe.reached:
            merged = merger.merge(probe.statistic, history, cut.binding.site)
        elif history is not None:
            merged = history
        else:
            merged = torch.ones(1, cut.binding.site.channels, device=given.residual.device)
        shape = (positions.numel(), cut.binding.site.channels)
        checked(merged, shape, "merge", "history merger", merger, cut.binding.site)
        if given.valid is not None and positions.dim() == 2:
            # Where every row has positions of its own, padding among them does not count.
            merged = merged.masked_fill(~pick_tokens(given.valid, probe.rows, positions).reshape(-1, 1), 0)
        channels, units = self._scored(state, merged.sum(0))
        given.batch.checks.add(channels, SCORES, cut.binding.site)
        return units

    def _scored(self, state: SiteState, statistic: Any) -> tuple[Tensor, Tensor]:
        """Scores of the channels (C,) and of the units (U,); statistic (C,), reduced gradients, or None."""
        scorer, site = self.strategy.scorer, state.binding.site
        channels = scorer.score(state.prepared(scorer), statistic)
        checked(channels, (site.channels,), "score", "scorer", scorer, site)
        units = scorer.unit_scores(channels, site.unit_size)
        return channels, checked(units, (site.units,), "unit_scores", "scorer", scorer, site)


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """The ``count`` units with the highest scores; (U,) -> (count,) int64 ascending."""
    return scores.topk(count).indices.sort().values
