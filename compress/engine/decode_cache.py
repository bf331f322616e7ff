"""Decisions that are stored with a key/value cache: decode steps reuse the decisions of their prefill."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from ...registry import DataError, Site

_numbers = itertools.count()

Kept = tuple[Tensor, "Tensor | None"]
"""Kept units (k,), and the mean (C,) of the probe where compensation uses one."""


class CacheDecisions:
    """Stores the decisions of one pruning on the cache object, so that generations may be interleaved."""

    def __init__(self) -> None:
        self._attribute = f"prunekit_{next(_numbers)}"

    def enter(self, cache: Any, layer: int, pruning: bool) -> int:
        """A layer begins; returns the positions that the cache holds of it.

        Raises :class:`DataError` for a cache that was filled with pruning on and continues with it off, or the other
        way round.
        """
        cached = int(cache.get_seq_length(layer))
        decided = self._decided(cache)
        if not cached:
            # A cache that was reset and is used for a new prompt must not restore its old decision.
            for key in [key for key in decided if key[0] == layer]:
                del decided[key]
            if pruning:
                decided[layer, "pruned"] = None
        elif pruning != ((layer, "pruned") in decided):
            how, now = ("without", "with") if pruning else ("with", "without")
            raise DataError(
                f"layer {layer}: the key/value cache already holds {cached} positions that were computed {how} "
                f"this pruning, and the model now runs {now} it; start the prompt with an empty cache"
            )
        return cached

    def of(self, cache: Any, site: Site) -> Kept | None:
        """What was decided for a site with this cache."""
        return self._decided(cache).get((site.layer, site.kind))

    def remember(self, cache: Any, site: Site, kept: Tensor, probe_mean: Tensor | None) -> None:
        """Keep a decision for the steps to come."""
        self._decided(cache)[site.layer, site.kind] = kept, probe_mean

    def _decided(self, cache: Any) -> dict[tuple[int, str], Any]:
        return cache.__dict__.setdefault(self._attribute, {})
