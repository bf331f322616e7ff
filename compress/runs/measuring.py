"""The subject of a run's evaluators: one pruned model, and the measurements that they share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch

from ...registry import (
    DataError,
    Evaluator,
    Measurement,
    PluginError,
    SiteKind,
    SiteScores,
    SparsityAllocator,
    SpecError,
    Stage,
    Subject,
    TextSource,
)
from ...registry.catalog import is_foreign, named
from ...registry.roles.evaluation import checked
from ...registry.tensors.devices import is_offloaded
from ..calibration.passes import Progress, no_progress
from ..engine.rotary import rotary_kept
from ..engine.weights import ModelWatch
from ..files.reader import by_name, with_rows
from ..models.loading import Loaded
from ..pruning.prune import prune
from ..pruning.pruned import Pruned
from ..pruning.sites import find_sites
from .documents import read_documents

Item = TypeVar("Item")

Known = dict[tuple[type[Evaluator], str], Measurement]
"""Measurements by the evaluator's :attr:`~prunekit.registry.Component.identity`."""


class Measuring(Subject):
    """A run's pruned model as its evaluators see it; what two of them ask for is measured once.

    ``dense`` holds the measurements of the unpruned model; runs on one loaded model may share it. ``evaluators`` are
    the run's own, the first choice where a measurement is asked for by name; others run no longer rows than
    ``positions``.
    """

    def __init__(
        self,
        loaded: Loaded,
        pruned: Pruned,
        progress: Progress,
        dense: Known,
        evaluators: Sequence[Evaluator] = (),
        seed: int = 0,
        positions: int | None = None,
    ):
        super().__init__(loaded.model, loaded.tokenizer)
        self.loaded, self.sites = loaded, pruned.all_sites
        if any(site.router is not None for site in self.sites):  # attentions and MLPs have a part in what it costs, too
            self.sites = [*self.sites, *find_sites(loaded.model, pruned.catalog, "kv_group", "keep")[1]]
        self._pruned, self._progress, self._evaluators, self._seed = pruned, progress, evaluators, seed
        self._positions = positions
        self._damaged: str | None = None
        """What an evaluator has done to the model's weights."""
        self._known: dict[bool, Known] = {True: dense, False: {}}

    def measure(self, evaluator: Evaluator | str, dense: bool = False) -> Measurement:
        """The evaluator's measurement, unpruned if ``dense`` or within :meth:`dense`; made once, histories reset.

        Raises :class:`PluginError` where the evaluator returns anything but numbers, and the evaluator's own errors.
        """
        evaluator = self._named(evaluator) if isinstance(evaluator, str) else evaluator
        known, key = self._known[dense or self._pruned.is_dense], evaluator.identity
        if self._damaged is not None:
            raise PluginError(self._damaged)
        if key not in known:
            self._begin()
            before = ModelWatch(self.model) if is_foreign(evaluator) else None
            try:
                with rotary_kept(self.model), self.dense() if dense else nullcontext():
                    known[key] = checked(evaluator, self._evaluated(evaluator))
            finally:
                left = [] if before is None else before.left()
                if before is not None and left:
                    before.restore()
            written = [] if before is None else before.weights()
            if written:
                self._damaged = (
                    f"{named(evaluator)} has written to {', '.join(written[:3])} of the model it measures, so that "
                    "nothing can be measured after it; fix the plugin"
                )
                raise PluginError(self._damaged)
            if left:
                note = f"{named(evaluator)} {'; '.join(left)}: it was put back, and this measurement may be wrong"
                known[key] = replace(known[key], notes=[*known[key].notes, note])
        self._begin()
        return known[key]

    def _evaluated(self, evaluator: Evaluator) -> Measurement:
        try:
            return evaluator.evaluate(self)
        except OSError as error:  # of a server or of a disk that has nothing to do with where results go
            reason = f"{type(error).__name__}: {error}; see to that, or leave the evaluator out"
            raise DataError(f"evaluator {evaluator.name} cannot measure: {reason}") from error

    def _begin(self) -> None:
        torch.manual_seed(self._seed)
        self.reset()

    def _named(self, name: str) -> Evaluator:
        named = [evaluator for evaluator in self._evaluators if evaluator.name == name]
        if named:
            return named[0]
        remedy = "measure it by an object, or list it with its options under evaluate"
        found = by_name(self._pruned.catalog, "evaluators", name, remedy)
        assert isinstance(found, Evaluator)
        return found if self._positions is None else with_rows(found, self._positions)

    def read(self, source: TextSource) -> list[str]:
        return read_documents(source, self.tokenizer)

    @property
    def depends_on_batch(self) -> bool:
        strategy = self._pruned.strategy
        folds_anew = strategy.compensates and any(map(is_offloaded, self.model.modules()))
        experts_differ = any(cut.site.expert is not None for cut in self._pruned.cuts)  # rows go to different ones
        return strategy.dynamic or strategy.probes_with is not None or folds_anew or experts_differ

    def dense(self) -> AbstractContextManager[Any]:
        return self._pruned.dense()

    def parameters(self) -> int:
        return self._pruned.active_parameters()

    def progress(self, items: Iterable[Item], label: str, total: int) -> Iterable[Item]:
        model = "dense" if self._pruned.is_dense else self._pruned.strategy.name
        return self._progress(items, f"{model}: {label}", total)

    def reset(self) -> None:
        self._pruned.reset()

    def kept(self) -> dict[tuple[int, SiteKind], tuple[int, ...]]:
        return {**super().kept(), **self._pruned.kept()}

    def watch(self, stage: Stage) -> AbstractContextManager[Any]:
        return self._pruned.watch(stage)

    def held_bytes(self) -> dict[str, int]:
        return self._pruned.held_bytes()

    @contextmanager
    def full_batch(self) -> Iterator[None]:
        """Within it as many units are chosen by probing the full batch, without history (PP's upper bound)."""
        own, strategy = self._pruned, self._pruned.strategy
        counts = tuple((layer, kind, count) for (layer, kind), count in own.counts.items())
        with (
            own.suspended(),
            prune(
                self.model,
                "full_batch_probing",
                catalog=own.catalog,
                allocator=SameCounts(counts=counts),
                skip_layers=strategy.skip_layers,
                selector="whole_batch",
                merger="probe_only",
                attention_unit=strategy.attention_unit,
            ) as other,
        ):
            measured, self._pruned, self._known[False] = self._known[False], other, {}
            try:
                yield
            finally:
                self._pruned, self._known[False] = own, measured


class Unpruned(Subject):
    """A loaded model without any pruning, as evaluators see it."""

    def __init__(self, loaded: Loaded, label: str = "dense", progress: Progress = no_progress):
        super().__init__(loaded.model, loaded.tokenizer)
        self._label, self._progress = label, progress

    def read(self, source: TextSource) -> list[str]:
        return read_documents(source, self.tokenizer)

    def progress(self, items: Iterable[Item], label: str, total: int) -> Iterable[Item]:
        return self._progress(items, f"{self._label}: {label}", total)


class SameCounts(SparsityAllocator):
    """Keeps as many units of every site as another pruning does."""

    takes_ratio = False
    name: Literal["same_counts"] = "same_counts"
    counts: tuple[tuple[int, str, int], ...]

    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        known = {(layer, kind): count for layer, kind, count in self.counts}
        missing = [s.site.label for s in sites if (s.site.layer, s.site.kind) not in known]
        if missing:
            raise SpecError(f"allocator same_counts: no count for {missing[0]}; list every site")
        return [known[s.site.layer, s.site.kind] for s in sites]
