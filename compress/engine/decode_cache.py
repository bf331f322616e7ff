"""Decisions that go with a key/value cache: decode steps keep to what the prefill of their generation decided."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from ...registry import DataError
from .site_cut import SiteCut

_numbers = itertools.count()

Kept = tuple[Tensor, "Tensor | None"]
"""Kept units (k,), and the mean (C,) of the probe where compensation asks for one."""


class CacheDecisions:
    """Keeps decisions on the cache itself, so that interleaved generations do not disturb each other."""

    def __init__(self) -> None:
        self._attribute = f"prunekit_{next(_numbers)}"
        self.cache: Any = None
        """The cache of the layer that runs; None without one."""
        self.filled = 0
        """Positions that it holds of that layer."""

    def enter(self, layer: int, cache: Any, pruning: bool) -> None:
        """A layer begins; raises :class:`DataError` for a cache filled with pruning on and gone on with it off, or
        the other way."""
        self.cache = cache
        if cache is None:
            self.filled = 0
            return
        self.filled = int(cache.get_seq_length(layer))
        decided = self._decided()
        if not self.filled:
            # A cache that was reset and is used for a new prompt must not bring back its old decision.
            for key in [key for key in decided if key[0] == layer]:
                del decided[key]
            if pruning:
                decided[layer, "pruned"] = None
        elif pruning != ((layer, "pruned") in decided):
            how, now = ("without", "with") if pruning else ("with", "without")
            raise DataError(
                f"layer {layer}: the key/value cache already holds {self.filled} positions that were computed {how} "
                f"this pruning, and the model now runs {now} it; start the prompt with an empty cache"
            )

    def leave(self) -> None:
        """The pass is over."""
        self.cache, self.filled = None, 0

    def of(self, cut: SiteCut) -> Kept | None:
        """What was decided for a site with this cache."""
        return None if self.cache is None else self._decided().get((cut.site.layer, cut.site.kind))

    def remember(self, cut: SiteCut, kept: Tensor, probe_mean: Tensor | None) -> None:
        """Keep a decision for the steps to come, where there is a cache."""
        if self.cache is not None:
            self._decided()[cut.site.layer, cut.site.kind] = kept, probe_mean

    def _decided(self) -> dict[tuple[int, str], Any]:
        return self.cache.__dict__.setdefault(self._attribute, {})
