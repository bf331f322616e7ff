"""Calibration statistics that several prunings of one model share."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from ..registry import ChannelHistory, Statistic
from ..registry.windows import digest
from .calibration import Batch, Progress, calibrate
from .cut import SiteCut
from .engine import Engine

Place = tuple[str, "tuple[type[Statistic], str] | None"]
"""Path of a consumer, and the statistic kept of it, options included."""

Histories = dict[Place, ChannelHistory]


class SharedStatistics:
    """What one loaded model has shown on the calibration texts used last, so that no text is read twice.

    What is shared is what does not depend on the strategy: the dense model's statistics of a site, by the
    text, the statistic and how padding counts. At most ``texts`` are remembered, the oldest going first;
    a 7B model's tables take about 1.8 GB for one text of 1,024 positions. Never shared: statistics
    of sequential calibration, which depend on what was cut before.
    """

    def __init__(self, texts: int = 4):
        self.texts = texts
        self._of: OrderedDict[tuple[str, str], Histories] = OrderedDict()

    def calibrate(self, engine: Engine, batches: list[Batch], progress: Progress) -> None:
        """Give every site its history, gathering what is not there yet in one pass over ``batches``."""
        key = (fingerprint(batches), engine.strategy.pad_handling)
        known = self._of.setdefault(key, {})
        self._of.move_to_end(key)
        if any(_place(cut) not in known for cut in engine.cuts):
            for cut in engine.cuts:
                cut.wants_mean = True  # so that strategies that compensate find it too
            calibrate(engine, batches, progress)
            known.update((_place(cut), cut.history) for cut in engine.cuts)
            while len(self._of) > self.texts:
                self._of.popitem(last=False)
        for cut in engine.cuts:
            cut.history = known[_place(cut)].clone()
            statistic = cut.scorer.statistic
            if not (cut.compensation.wanted or (statistic is not None and statistic.tracks_mean)):
                cut.history.mean, cut.history.tokens = None, 0.0  # as if gathered for this strategy alone


def _place(cut: SiteCut) -> Place:
    statistic = cut.scorer.statistic
    return cut.site.consumer, None if statistic is None else statistic.identity


def fingerprint(batches: list[Batch]) -> str:
    """sha256 over ids and masks of all batches."""

    def tensors(batch: Batch) -> list[Tensor]:
        return [batch[key] for key in ("input_ids", "attention_mask") if key in batch]

    return digest(tensor for batch in batches for tensor in tensors(batch))
