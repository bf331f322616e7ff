"""Overlap of the kept units with those of full-batch probing, and between batches."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import fsum
from typing import ClassVar, Literal

import numpy
import torch
from pydantic import Field
from scipy.stats import hypergeom
from torch import Tensor

from ..registry import Evaluator, Measurement, SiteKind, Subject, hookimpl
from ..registry.tensors.windows import digest
from .passes import TextBatches, setting

Place = tuple[int, SiteKind]
Kept = dict[Place, frozenset[int]]


class Overlap(TextBatches):
    """Jaccard overlap of the kept units with full-batch probing's, and between batches, per layer and kind.

    The overlap of two sets is |A n B| / |A u B|. ``full_batch`` compares each batch's units with the same number of
    units chosen by probing the whole batch (PP's score, without history), and is the mean over batches.
    ``between_batches`` is the mean over all pairs of batches, 1 for strategies that decide once. ``chance`` is the mean
    overlap of two random sets of these sizes, because large sets overlap in any case. Values are means over sites.
    Sites that keep all of their units, or none, make no choice: null in the details, and part of no mean.
    """

    paired: ClassVar[bool] = True

    name: Literal["overlap"] = "overlap"
    batches: int = Field(default=4, ge=1, description="batches to run")

    def evaluate(self, subject: Subject) -> Measurement:
        """Run all batches pruned, then by full-batch probing; raises DataError if the text is too short."""
        batches, about = self.read_batches(subject)
        own = self._run(subject, batches, "overlap")
        with subject.full_batch():
            full = self._run(subject, batches, "overlap, full batch")
        units = {(site.layer, site.kind): site.units for site in subject.sites}
        chosen = [place for place, count in units.items() if any(0 < len(kept[place]) < count for kept in own)]
        pairs = list(combinations(own, 2))
        found = {
            "full_batch": {place: mean_overlap(place, list(zip(own, full, strict=True))) for place in chosen},
            "between_batches": {place: mean_overlap(place, pairs) for place in chosen if pairs},
            "chance": {place: random_overlap(units[place], len(own[0][place])) for place in chosen},
        }
        notes = []
        if not chosen:
            notes.append("every site keeps all of its units or none, so there is no choice to compare")
        elif not pairs:
            notes.append("there is one batch only, so between_batches is empty; set batches to 2 or more")
        protocol = {
            **about,
            "order": "text order",
            "sites": len(chosen),
            "ids_sha256": digest(batches),
            **setting(subject.model),
        }
        values = {name: fsum(by.values()) / len(by) if by else None for name, by in found.items()}
        return Measurement(values, protocol, notes, {name: by_layer(by, units) for name, by in found.items()})

    def _run(self, subject: Subject, batches: list[Tensor], label: str) -> list[Kept]:
        """The kept units of every batch."""
        found = []
        for ids in subject.progress(batches, label, len(batches)):
            with torch.no_grad():
                subject.model(input_ids=ids, use_cache=False)
            found.append({place: frozenset(units) for place, units in subject.kept().items()})
        return found


def mean_overlap(place: Place, pairs: list[tuple[Kept, Kept]]) -> float:
    """Mean Jaccard overlap of one site's units over pairs of runs."""
    return fsum(jaccard(a[place], b[place]) for a, b in pairs) / len(pairs)


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """|A n B| / |A u B|; 1 for two empty sets."""
    together = len(a | b)
    return len(a & b) / together if together else 1.0


@cache
def random_overlap(units: int, kept: int) -> float:
    """Expected Jaccard overlap of two independent random sets of ``kept`` of ``units``; 0 < kept <= units.

    The number s of shared units is hypergeometric, and the overlap is s / (2 kept - s): about kept / (2 units - kept).
    """
    shared = numpy.arange(kept + 1)
    return float(hypergeom.pmf(shared, units, kept, kept) @ (shared / (2 * kept - shared)))


def by_layer(values: dict[Place, float], units: dict[Place, int]) -> dict[SiteKind, list[float | None]]:
    """Values by kind, one for each layer with such a site, None for a site without a value."""
    found: dict[SiteKind, list[float | None]] = {}
    for layer, kind in sorted(units):
        found.setdefault(kind, []).append(values.get((layer, kind)))
    return found


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Overlap]
