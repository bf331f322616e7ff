"""One pruned model before its evaluators: each sees the same subject, and what two of them ask for is measured once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from ...registry import (
    Evaluator,
    Measurement,
    SiteKind,
    SiteScores,
    SparsityAllocator,
    SpecError,
    Stage,
    Subject,
    TextSource,
)
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
        self.running = pruned
        self._known: dict[bool, Known] = {True: dense, False: {}}

    def measure(self, evaluator: Evaluator | str, dense: bool = False) -> Measurement:
        """The evaluator's measurement, unpruned if ``dense``; made now, unless it was made before.

        Raises :class:`PluginError` where the evaluator returns anything but numbers, and the evaluator's own errors.
        """
        evaluator = self._evaluator(evaluator) if isinstance(evaluator, str) else evaluator
        key = evaluator.identity
        if key not in self._known[dense]:
            self.begin()
            with self.running.dense() if dense else nullcontext():
                self._known[dense][key] = checked(evaluator, evaluator.evaluate(self.subject()))
        return self._known[dense][key]

    def subject(self) -> Subject:
        """What an evaluator gets to see."""
        return _RunSubject(self)

    def begin(self) -> None:
        torch.manual_seed(self.seed)
        self.running.reset()

    def _evaluator(self, name: str) -> Evaluator:
        named = [evaluator for evaluator in self.listed if evaluator.name == name]
        found = named[0] if named else self.running.catalog.get("evaluators", name).model_validate({})
        assert isinstance(found, Evaluator)
        return found

    @contextmanager
    def full_batch(self) -> Iterator[None]:
        """The model pruned to the same counts by what the whole batch shows of itself."""
        own, strategy = self.running, self.running.strategy
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
            measured, self.running, self._known[False] = self._known[False], other, {}
            try:
                yield
            finally:
                self.running, self._known[False] = own, measured


class _RunSubject(Subject):
    """A run's pruned model, as evaluators see it."""

    def __init__(self, run: Measuring):
        super().__init__(run.loaded.model, run.loaded.tokenizer)
        self._run, self.sites = run, run.running.all_sites

    def read(self, source: TextSource) -> list[str]:
        return read_documents(source)

    def dense(self) -> AbstractContextManager[Any]:
        return self._run.running.dense()

    def parameters(self) -> int:
        return self._run.running.active_parameters()

    def progress(self, items: Iterable[Any], label: str, total: int) -> Iterable[Any]:
        running = self._run.running
        return self._run.progress(items, f"{'dense' if running.is_dense else running.strategy.name}: {label}", total)

    def reset(self) -> None:
        self._run.running.reset()

    def measure(self, evaluator: Evaluator | str) -> Measurement:
        found = self._run.measure(evaluator, self._run.running.is_dense)
        self._run.begin()  # whether it was measured now or before
        return found

    def kept(self) -> dict[tuple[int, SiteKind], tuple[int, ...]]:
        return {**super().kept(), **self._run.running.kept()}

    def watch(self, stage: Stage) -> AbstractContextManager[Any]:
        return self._run.running.watch(stage)

    def full_batch(self) -> AbstractContextManager[Any]:
        return self._run.full_batch()

    def held_bytes(self) -> dict[str, int]:
        return self._run.running.held_bytes()


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
