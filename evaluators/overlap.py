"""How far the kept units agree with full-batch probing, and from batch to batch."""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import exp, fsum, lgamma
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import Evaluator, Measurement, SiteKind, Subject, TextSource, hookimpl
from ..registry.tensors.windows import digest
from .inputs import clamped, setting, text_batches

Place = tuple[int, SiteKind]
Kept = dict[Place, frozenset[int]]


class Overlap(Evaluator):
    """Jaccard overlap of the kept units with full-batch probing's, and between batches, per layer and kind.

    The overlap of two sets is what they share over what either has, |A n B| / |A u B|. ``full_batch`` compares each
    batch's units with those that probing the whole batch picks, as many of them (PP's score, without history), and
    is the mean over batches; ``between_batches`` is the mean over all pairs of batches, 1 for strategies that decide
    once. Values are means over sites. ``chance`` is what two random sets of these sizes share on average, because
    large sets overlap whatever picks them.
    Sites that keep all of their units, or none, have nothing to choose: null in the details and in no mean.
    """

    paired: ClassVar[bool] = True

    name: Literal["overlap"] = "overlap"
    text: TextSource = Field(default=TextSource(bundled="reference-evaluation"), description="what to run on")
    batch_size: int = Field(
        default=20, ge=1, description="sequences of a batch; strategies that probe decide per batch"
    )
    length: int = Field(default=256, ge=1, description="tokens of each sequence, at most the model's context")
    batches: int = Field(default=4, ge=1, description="batches to run")

    def evaluate(self, subject: Subject) -> Measurement:
        """Run all batches pruned, then by full-batch probing; raises DataError where the text is too short."""
        length = clamped(self.length, subject.model)
        batches = text_batches(subject, self.text, self.batches, self.batch_size, length)
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
            notes.append(
                "one batch has no other to compare with, so between_batches is empty; set batches to 2 or more"
            )
        protocol = {
            "text": self.text.label,
            "batch_size": self.batch_size,
            "length": length,
            "batches": self.batches,
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
        for ids in subject.progress(iter(batches), label, len(batches)):
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

    The shared number s is hypergeometric, and s of them overlap by s / (2 kept - s). About kept / (2 units - kept).
    """

    def log_choose(n: int, k: int) -> float:
        return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)

    total = log_choose(units, kept)
    terms = (
        exp(log_choose(kept, shared) + log_choose(units - kept, kept - shared) - total) * shared / (2 * kept - shared)
        for shared in range(max(0, 2 * kept - units), kept + 1)
    )
    return fsum(terms)


def by_layer(values: dict[Place, float], units: dict[Place, int]) -> dict[SiteKind, list[float | None]]:
    """Values by kind, one for each layer that has such a site, None where the site has no value."""
    found: dict[SiteKind, list[float | None]] = {}
    for layer, kind in sorted(units):
        found.setdefault(kind, []).append(values.get((layer, kind)))
    return found


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Overlap]
