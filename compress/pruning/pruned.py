"""The handle of a pruned model, which measures, pauses and undoes what was done to it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...registry import Catalog, PruneWarning, Site, SiteKind, SiteScores, SpecError, Stage, Strategy
from ..calibration.passes import Progress, no_progress
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from ..output.formatting import achieved
from ..output.records import MatchFacts, Ratio
from .freezing import Freeze, frozen_units
from .matching import DecoderCost, Match
from .notes import (
    about_compensation,
    notes_on,
    notes_on_blocks,
    notes_on_cut,
    notes_on_experts,
    notes_on_policy,
    notes_on_what_is_left,
    ratio_of,
)
from .sites import left_whole, partly_covered


class Pruned:
    """A pruned model: use the model as before; this handle knows what was cut, and takes it back.

    A context manager: leaving it calls :meth:`remove`.
    """

    _saver: ClassVar[Callable[[Pruned, str | os.PathLike[str], str, Any], Path] | None] = None
    """What :meth:`save` calls. Exports stand above this room, and set it."""

    def __init__(self, engine: Engine, catalog: Catalog, matched: MatchFacts | None = None):
        self._engine = engine
        self.matched = matched
        """The ratio that was used instead of the strategy's, where the decoder's cost was to be matched."""
        self.changed: str | None = None
        """After :meth:`remove`: what is not as it was on the model, and whose components ran; None: nothing."""
        self._cost = self.decoder_cost(Match("parameters"))
        self._calibrated = engine.histories() if engine.hooks.learner is not None else None
        self.catalog = catalog
        self._left = left_whole(engine.model, catalog, engine.strategy.experts)

    def __repr__(self) -> str:
        if not hasattr(self, "_engine"):
            return "<Pruned: removed and forgotten>"
        layers = len({site.layer for site in self.sites})
        state = " (removed)" if self._engine.is_removed else ""
        return (
            f"<Pruned {type(self.model).__name__} by {self.strategy.name}{state}: {achieved(self.ratio)}; "
            f"{layers} of {len(self._engine.layers)} layers>"
        )

    @property
    def model(self) -> nn.Module:
        return self._engine.model

    @property
    def strategy(self) -> Strategy:
        return self._engine.strategy

    @property
    def trace(self) -> list[dict[str, Any]] | None:
        """One record per decision, where ``trace=True`` was asked for.

        Keys: ``batch`` (None for a strategy that decides once), ``layer``, ``kind``, ``rows`` and
        ``positions`` of the probe, ``kept`` units, ascending. Where rows of a batch decide apart, a record for each
        group, whose rows are ``group``.
        """
        return self._engine.hooks.trace

    @property
    def search(self) -> list[dict[str, Any]]:
        """What the allocator has recorded of its search, step by step; empty where it does not search."""
        return [dict(entry) for entry in self._engine.searched]

    @property
    def sites(self) -> list[Site]:
        """The sites that can be cut; those of skipped layers are not among them."""
        return [cut.site for cut in self._engine.cuts]

    @property
    def cuts(self) -> Sequence[SiteCut]:
        """The sites with everything that is known of their cuts, for what writes them out."""
        return self._engine.cuts

    @property
    def all_sites(self) -> Sequence[Site]:
        """Every site of the model, those of skipped layers too."""
        return self._engine.all_sites

    @property
    def sites_kept(self) -> dict[tuple[int, SiteKind], tuple[int, ...]]:
        """The units that every site of the model keeps once and for all, ascending, skipped layers included.

        Of a strategy that decides per batch: all units, where nothing has been decided once.
        """
        found = {(site.layer, site.kind): tuple(range(site.units)) for site in self.all_sites}
        for cut in self.cuts:
            if not cut.whole and cut.fixed is not None:
                found[cut.site.layer, cut.site.kind] = tuple(cut.fixed.tolist())
        return found

    def calibrated_scores(self, cut: SiteCut) -> SiteScores | None:
        """A site's scores by calibration alone, on the CPU; None where nothing but a batch gives any."""
        if not cut.state.has_scores:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return self._engine.decider.scores(cut)

    @property
    def counts(self) -> dict[tuple[int, SiteKind], int]:
        """Kept units by layer and kind, constant over batches."""
        return {(cut.site.layer, cut.site.kind): cut.count for cut in self._engine.cuts}

    def decoder_cost(self, match: Match) -> DecoderCost:
        """What the dense decoder costs as ``match`` counts it, and its units."""
        return DecoderCost.of(self.model, self._engine.layers, self.all_sites, match)

    @property
    def ratio(self) -> Ratio:
        """The share to cut as requested, and as achieved of units and of prunable parameters."""
        asked, lost = self.strategy.ratio, self._cost.lost(self.counts)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return ratio_of(self.all_sites, self.counts, asked, lost, self.matched, parameters, self._left)

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of this pruning, in sentences.

        What no site cuts; whole layers, attentions and MLPs that are gone; a cut that is far from what was requested,
        or that rounds to nothing at some sites; a covariance of too few tokens, and sites that fell back to the mean.
        """
        partly = partly_covered(self.model, self._engine.layers, self.all_sites)
        gone = notes_on_blocks(self.all_sites, self.counts, partly)
        on_cut = notes_on_cut(self.strategy, self.all_sites, self.counts, self.ratio)
        choices = [cut.state.choice for cut in self._engine.cuts if cut.state.choice is not None]
        unreached = notes_on_experts(self._engine.cuts) if self.strategy.needs_calibration else []
        compensated = notes_on([cut.compensation for cut in self._engine.cuts], choices)
        on_policy = notes_on_policy(self.strategy.policy)
        return *notes_on_what_is_left(self.ratio), *gone, *on_cut, *on_policy, *unreached, *compensated

    def about_compensation(self) -> dict[str, Any] | None:
        """The compensator with its options, tokens of its covariances, labels of sites that fell back; None: none."""
        return about_compensation(self.strategy.compensate, [cut.compensation for cut in self._engine.cuts])

    @contextmanager
    def dense(self) -> Iterator[nn.Module]:
        """Within it the model runs unpruned, and no history is touched."""
        with self._engine.mode_of("dense"):
            yield self.model

    def reset(self) -> None:
        """Put the channel histories back to their calibrated state, so that a measurement can be repeated.

        Batches are counted from 0 again and random components draw from the start; the trace is kept.
        """
        with torch.inference_mode(False):
            self._engine.restore(self._calibrated)

    def refresh(self) -> None:
        """Use the weights as they are now, in the next decode step too.

        Weights that were changed in any way are noticed where a prompt begins. Between the decode steps of a prompt,
        writes through ``.data`` are not: torch does not count them.
        """
        self._engine.refresh()

    def freeze(
        self, how: Freeze, calibration: Iterable[Any] | None = None, progress: Progress = no_progress
    ) -> dict[tuple[int, SiteKind], tuple[int, ...]]:
        """Cut once and for all from now on, and return the units by layer and kind.

        ``how``: ``mean-score``, the units with the highest score on average over the ``calibration`` batches;
        ``last``, what the last of them kept; ``calibration``, what the calibrated history alone would keep. A mean
        that compensation took from a probe becomes the calibrated mean, and a slope that a probe checked is used whole.
        Strategies that decide once keep their units.
        Raises :class:`SpecError` and :class:`DataError`; nothing has changed then.
        """
        if self.is_dense or self._engine.is_suspended:
            raise SpecError("freeze: the model runs unpruned here; freeze it outside of dense() and suspended()")
        self.reset()
        with torch.inference_mode(False), torch.no_grad():
            try:
                kept = frozen_units(self._engine, how, calibration, progress)
            finally:
                self.reset()
            self._engine.freeze([units.clone() for units in kept])
        self._calibrated = None
        return self.kept()

    def compute_with(self, weights: Mapping[nn.Module, tuple[Tensor, Tensor | None]]) -> None:
        """Compute with these weights and biases of linear layers from now on, in the shapes of the cut's fixed units.

        Of layers that are not cut the weight alone is taken. Within :meth:`dense`, after :meth:`remove`, and in a
        ``state_dict()``, the model has its own. Raises :class:`SpecError` for a cut that
        is made per batch, and for a weight of another shape.
        """
        if self.strategy.dynamic:
            raise SpecError(f"strategy {self.strategy.name} decides per batch; freeze it first")
        self._engine.compute_with(weights)

    def save(self, folder: str | os.PathLike[str], *, profile: str = "hf-hetero", tokenizer: Any = None) -> Path:
        """Write the smaller model to a new folder, which transformers loads, and return the folder's path.

        The cut must be made once: :meth:`freeze` a strategy that decides per batch. ``profile`` is ``hf-hetero``
        (every layer its own shape), ``hf-uniform`` (a stock class, equal shapes) or ``padded`` (original shapes, zeros
        for dropped units); ``tokenizer`` is saved with it. Raises :class:`SpecError` for a cut that the profile cannot
        hold and for a folder that exists; there is no folder then.
        """
        saver = type(self)._saver
        if saver is None:
            raise SpecError("pruned.save: import prune from prunekit.compress, which exports belong to")
        return saver(self, folder, profile, tokenizer)

    @property
    def is_dense(self) -> bool:
        """Whether the model runs unpruned now, as it does within :meth:`dense`."""
        return self._engine.mode == "dense"

    def suspended(self) -> AbstractContextManager[None]:
        """Within it the model is as it was before pruning, hooks included, and may be pruned by another strategy."""
        return self._engine.suspended()

    def watch(self, stage: Stage) -> AbstractContextManager[None]:
        """Within it the steps of every decision (:data:`~prunekit.registry.STAGES`) are announced to ``stage``."""
        return self._engine.shared.stages.watched(stage)

    def kept(self) -> dict[tuple[int, SiteKind], tuple[int, ...]]:
        """The units, by layer and kind, that the last forward pass computed with, ascending.

        Where rows of a batch have their own (``group_by``), those of the first row; the trace has all.
        """
        found = {}
        for cut in self._engine.cuts:
            computed = None if self.is_dense or cut.whole else cut.computed
            if computed is not None and computed.dim() == 2:
                computed = computed[0]
            units = range(cut.site.units) if computed is None else computed.tolist()
            found[cut.site.layer, cut.site.kind] = tuple(units)
        return found

    def held_bytes(self) -> dict[str, int]:
        """Bytes held besides the model now: ``statistics`` of all sites, and ``gathered`` weights that it runs with."""
        statistics = sum(cut.state.bytes for cut in self._engine.cuts)
        statistics += sum(history.bytes for history in self._calibrated or ())
        engine = self._engine
        copies = [*engine.shared.gatherer.buffers, *(t for cut in engine.cuts for t in cut.copies())]
        copies += engine.hooks.replaced.given
        pieces = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in copies}
        return {"statistics": statistics, "gathered": sum(pieces.values())}

    def active_parameters(self) -> int:
        """Parameters of the model without those of the units that go; a probe still computes with all of them."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        if self.is_dense or not self.strategy.applier.resizes:
            return total
        for cut in self._engine.cuts:
            if not cut.count:
                total -= cut.binding.parameters - cut.site.outputs * cut.compensation.wanted
                continue
            total -= (cut.site.units - cut.count) * cut.site.unit_parameters
            if cut.compensation.wanted and cut.binding.consumer.bias is None and not cut.whole:
                total += cut.site.outputs
        return total

    def remove(self) -> None:
        """Undo everything: the model is bit-identical to before. Calling it again does nothing.

        Warns (:class:`PruneWarning`) where weights or hooks are not what they were and parts of other people's plugins
        ran: torch's counts of writes, buffers and hooks are compared.
        """
        if not hasattr(self, "_engine"):
            return
        first = not self._engine.is_removed
        self._engine.remove()
        self.changed = self._engine.changed() if first else self.changed
        if first and self.changed:
            warnings.warn(
                f"{self.changed}; load the model again, unless you have changed it", PruneWarning, stacklevel=2
            )

    def forget(self) -> None:
        """After :meth:`remove`: hold the model no longer, so that its memory can be freed."""
        self.remove()
        del self._engine

    def __enter__(self) -> Pruned:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()
