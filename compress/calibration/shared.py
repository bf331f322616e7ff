"""Calibration statistics that several prunings of one model share."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from ...registry import ChannelHistory, ChannelMoments, GroupPart, Statistic
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from .fitting import Fits
from .journal import Journal
from .origin import fingerprint, origin_of
from .passes import Batch, Progress, calibrate

Place = tuple[str, "tuple[type[Statistic], str] | None"]
"""Path of a consumer, and the statistic kept of it, options included."""

Histories = dict[Place, ChannelHistory]

Known = TypeVar("Known")


class SharedStatistics:
    """What one loaded model has shown on the calibration texts used last, so that no text is read twice.

    What is shared is what does not depend on the strategy: the dense model's statistics of a site, by the text and the
    statistic, what allocators have measured, what scorers have fitted, and reduced gradients. At most ``texts`` are
    remembered, the oldest going first; a 7B model's tables take about 1.8 GB for one text of 1,024 positions.
    Covariances are shared up to ``covariance_bytes`` for each text: those of a model of 135M parameters take 0.3 GB.
    Never shared: statistics of a model that is partly cut (sequential calibration, choices in several steps).

    What allocators measure is written to the file ``journal``, where there is one, so that a run that was killed
    resumes to the same result.
    """

    def __init__(self, texts: int = 4, covariance_bytes: int = 2**29, journal: Path | None = None):
        self.texts, self.journal = texts, journal
        self._of: OrderedDict[str, Histories] = OrderedDict()
        self._moments: OrderedDict[str, SomeMoments] = OrderedDict()
        self._measured: OrderedDict[str, MutableMapping[str, float]] = OrderedDict()
        self._gradients: OrderedDict[str, dict[str, tuple[GroupPart, ...]]] = OrderedDict()
        self._fits: OrderedDict[str, Fits] = OrderedDict()
        self._covariance_bytes = covariance_bytes
        self.generated: dict[tuple, Tensor] = {}
        """Texts that the model has generated, by how."""

    def calibrate(self, engine: Engine, batches: list[Batch], progress: Progress) -> None:
        """Give every site its history, gathering what is not there yet in one pass over ``batches``."""
        key = fingerprint(batches)
        known = self._of.setdefault(key, {})
        self._of.move_to_end(key)
        if any(_place(cut) not in known for cut in engine.cuts):
            calibrate(engine, batches, progress, every_mean=True)
            known.update((_place(cut), cut.history) for cut in engine.cuts)
            while len(self._of) > self.texts:
                self._of.popitem(last=False)
        for cut in engine.cuts:
            cut.state.replace_history(wanted(cut, known[_place(cut)].clone()))

    def moments(self, batches: list[Batch]) -> SomeMoments:
        """Means and covariances of consumers' inputs on the dense model, by the consumer's path.

        They are many times larger than the other statistics, so each text's are kept up to ``covariance_bytes`` only.
        """
        return self._of_text(self._moments, batches, SomeMoments(self._covariance_bytes))

    @contextmanager
    def measured(self, engine: Engine, batches: list[Batch]) -> Iterator[MutableMapping[str, float]]:
        """The numbers that allocators have measured on this text, by what they are of; new ones are added to them."""
        if self.journal is not None and fingerprint(batches) not in self._measured:
            self._measured[fingerprint(batches)] = Journal(self.journal, origin_of(engine.model, batches))
        yield self._of_text(self._measured, batches, {})

    def gradients(self, batches: list[Batch]) -> dict[str, tuple[GroupPart, ...]]:
        """What scorers have made of the dense model's gradients on this text; new ones are added to it."""
        return self._of_text(self._gradients, batches, {})

    @contextmanager
    def fits(self, engine: Engine, batches: list[Batch]) -> Iterator[Fits]:
        """What scorers have fitted with the dense model on this text; new ones are added to it."""
        yield self._of_text(self._fits, batches, {})

    def _of_text(self, known: OrderedDict[str, Known], batches: list[Batch], empty: Known) -> Known:
        """What is known of a text, which becomes the one used last; the texts used longest ago are forgotten."""
        key = fingerprint(batches)
        found = known.setdefault(key, empty)
        known.move_to_end(key)
        while len(known) > self.texts:
            known.popitem(last=False)
        return found


def wanted(cut: SiteCut, history: ChannelHistory) -> ChannelHistory:
    """The part of a history that would have been gathered for this strategy alone."""
    statistic = cut.state.statistic
    if cut.compensation.wanted or (statistic is not None and statistic.tracks_mean):
        return history
    return replace(history, mean=None, tokens=0.0)


class SomeMoments(UserDict[str, ChannelMoments]):
    """Moments of sites by their consumer, copies of as many as fit in ``limit`` bytes; the rest are forgotten."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def __setitem__(self, consumer: str, moments: ChannelMoments) -> None:
        held = sum(ChannelMoments.bytes_of(known.channels) for known in self.data.values())
        if held + ChannelMoments.bytes_of(moments.channels) <= self.limit:
            self.data[consumer] = moments.clone()


def _place(cut: SiteCut) -> Place:
    statistic = cut.state.statistic
    weighted = " router_weights" if cut.state.router_weights else ""
    return cut.site.consumer + weighted, None if statistic is None else statistic.identity
