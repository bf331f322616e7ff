"""One pruned model before its evaluators: each sees the same subject, and what two of them ask for is measured once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch

from ...registry import Evaluator, Measurement, SiteScores, SparsityAllocator, SpecError, Subject
from ...registry.roles.evaluation import checked
from ..calibration.passes import Progress
from ..models.loading import Loaded
from ..pruning.prune import prune
from ..pruning.pruned import Pruned
from .text import read_documents

Known = dict[tuple[type[Evaluator], str], Measurement]
"""Measurements by the evaluator's :attr:`~prunekit.registry.Component.identity`."""


class Measuring:
    """Runs evaluators on one pruned model.

    ``dense`` holds what was measured on the unpruned model; runs on one loaded model may share it.
    ``listed`` are the run's evaluators: another one that asks for a measurement by name means the first of them.
    """

    def __init__(
        self,
        loaded: Loaded,
        pruned: Pruned,
        progress: Progress,
        dense: Known,
        listed: Sequence[Evaluator] = (),
        seed: int = 0,
    ):
        self.loaded, self.progress, self.listed, self.seed = loaded, progress, listed, seed
        self._running = pruned
        self._known: dict[bool, Known] = {True: dense, False: {}}

    def measure(self, evaluator: Evaluator | str, dense: bool = False) -> Measurement:
        """The evaluator's measurement, unpruned if ``dense``; made now, unless it was made before.

        Raises :class:`PluginError` where the evaluator returns anything but numbers, and the evaluator's own errors.
        """
        evaluator = self._evaluator(evaluator) if isinstance(evaluator, str) else evaluator
        key = evaluator.identity
        if key not in self._known[dense]:
            self._begin()
            with self._running.dense() if dense else nullcontext():
                self._known[dense][key] = checked(evaluator, evaluator.evaluate(self.subject()))
        return self._known[dense][key]

    def subject(self) -> Subject:
        """What an evaluator gets to see."""
        return Subject(
            model=self.loaded.model,
            tokenizer=self.loaded.tokenizer,
            read=read_documents,
            dense=lambda: self._running.dense(),
            parameters=lambda: self._running.active_parameters(),
            progress=self._track,
            reset=lambda: self._running.reset(),
            measure=self._for_another,
            sites=self._running.all_sites,
            kept=self._kept,
            watch=lambda stage: self._running.watch(stage),
            full_batch=self._full_batch,
            held_bytes=lambda: self._running.held_bytes(),
        )

    def _for_another(self, evaluator: Evaluator | str) -> Measurement:
        """A measurement that another evaluator asks for; it goes on from the same state, measured now or before."""
        found = self.measure(evaluator, self._running.is_dense)
        self._begin()
        return found

    def _begin(self) -> None:
        torch.manual_seed(self.seed)
        self._running.reset()

    def _evaluator(self, name: str) -> Evaluator:
        named = [evaluator for evaluator in self.listed if evaluator.name == name]
        found = named[0] if named else self._running.catalog.get("evaluators", name).model_validate({})
        assert isinstance(found, Evaluator)
        return found

    def _track(self, items: Any, label: str, total: int) -> Any:
        what = "dense" if self._running.is_dense else self._running.strategy.name
        return self.progress(items, f"{what}: {label}", total)

    def _kept(self) -> dict:
        everything = {(site.layer, site.kind): tuple(range(site.units)) for site in self._running.all_sites}
        return {**everything, **self._running.kept()}

    @contextmanager
    def _full_batch(self) -> Iterator[None]:
        """The model pruned to the same counts by what the whole batch shows of itself."""
        own, strategy = self._running, self._running.strategy
        counts = tuple((layer, kind, count) for (layer, kind), count in own.counts.items())
        with (
            own.suspended(),
            prune(
                self.loaded.model,
                "full_batch_probing",
                catalog=own.catalog,
                allocator=SameCounts(counts=counts),
                skip_layers=strategy.skip_layers,
                selector="whole_batch",
                merger="probe_only",
                attention_unit=strategy.attention_unit,
            ) as other,
        ):
            measured, self._running, self._known[False] = self._known[False], other, {}
            try:
                yield
            finally:
                self._running, self._known[False] = own, measured


class SameCounts(SparsityAllocator):
    """Keeps as many units of every site as another pruning does."""

    takes_ratio = False
    name: Literal["same_counts"] = "same_counts"
    counts: tuple[tuple[int, str, int], ...]

    def allocate(self, sites: Sequence[SiteScores], ratio: float | None) -> list[int]:
        known = {(layer, kind): count for layer, kind, count in self.counts}
        missing = [s.site.label for s in sites if (s.site.layer, s.site.kind) not in known]
        if missing:
            raise SpecError(f"allocator same_counts: no count for {missing[0]}; list every site")
        return [known[s.site.layer, s.site.kind] for s in sites]
