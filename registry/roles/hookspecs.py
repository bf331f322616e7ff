"""The hooks a plugin can implement: one per role, no arguments, each returns a list of classes."""

from __future__ import annotations

from typing import Protocol

import pluggy

from ..component import Component
from .compensation import Compensator
from .evaluation import Evaluator
from .parts import Architecture, HistoryMerger, MaskApplier, ProbeSelector, Scorer, SparsityAllocator
from .strategy import Strategy

PROJECT = "prunekit"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

ROLES: dict[str, type[Component]] = {
    "strategies": Strategy,
    "scorers": Scorer,
    "probe_selectors": ProbeSelector,
    "history_mergers": HistoryMerger,
    "mask_appliers": MaskApplier,
    "allocators": SparsityAllocator,
    "compensators": Compensator,
    "architectures": Architecture,
    "evaluators": Evaluator,
}
"""Hook name -> what the classes it returns must derive from."""


class Hooks(Protocol):
    """The specifications that pluggy checks implementations against."""

    @hookspec
    def strategies(self) -> list[type[Strategy]]:
        """Named compositions, chosen by ``prune: {use: NAME}``."""

    @hookspec
    def scorers(self) -> list[type[Scorer]]:
        """Channel scores."""

    @hookspec
    def probe_selectors(self) -> list[type[ProbeSelector]]:
        """Which rows and positions of a batch a dynamic strategy probes."""

    @hookspec
    def history_mergers(self) -> list[type[HistoryMerger]]:
        """How the probe's statistic and history are merged."""

    @hookspec
    def mask_appliers(self) -> list[type[MaskApplier]]:
        """How a decision reaches the weights."""

    @hookspec
    def allocators(self) -> list[type[SparsityAllocator]]:
        """How many units every site keeps."""

    @hookspec
    def compensators(self) -> list[type[Compensator]]:
        """How the contribution of what is dropped is compensated."""

    @hookspec
    def architectures(self) -> list[type[Architecture]]:
        """Model families and their prunable sites."""

    @hookspec
    def evaluators(self) -> list[type[Evaluator]]:
        """Measurements of a model."""
