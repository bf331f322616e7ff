"""What the published codes of Probe Pruning and of FLAP compute where it differs from their papers.

Each difference uses a hook that every strategy has, so that recorded results of those codes can be reproduced
(tests/test_golden.py). docs/strategies.md lists the differences.
"""

from __future__ import annotations

from ...registry import HistoryMerger, Scorer, SparsityAllocator, Strategy, hookimpl
from .flap import FlapReference, FlapReferenceAllocator, FlapReferenceScorer, Wifn
from .pp import PPReference, PPReferenceFixedRatio, PPReferenceFullBatch, PPReferenceWandaSp
from .pp_flap import PPReferenceFlap, PPReferenceFlapAllocator, PPReferenceFlapScorer


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [FlapReferenceScorer, PPReferenceFlapScorer, Wifn]


@hookimpl
def history_mergers() -> list[type[HistoryMerger]]:
    return [PPReferenceFixedRatio]


@hookimpl
def allocators() -> list[type[SparsityAllocator]]:
    return [FlapReferenceAllocator, PPReferenceFlapAllocator]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [PPReference, PPReferenceFullBatch, PPReferenceWandaSp, PPReferenceFlap, FlapReference]
