"""The hooks a plugin can implement: one per role, no arguments, each returns a list of classes."""

from __future__ import annotations

import pluggy

from ..component import Component
from .compensation import Compensator
from .evaluation import Evaluator
from .exporting import ExportFormat
from .grouping import Grouping
from .parts import Architecture, HistoryMerger, MaskApplier, ProbeSelector, Scorer, SparsityAllocator
from .policies import Policy
from .strategy import Strategy

PROJECT = "prunekit"
PLUGIN_API = 1
"""Version of what plugins are written against: roles, hooks and what their methods get. A plugin may state its own as
``PLUGIN_API``; another number is refused when it is loaded."""

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
    "policies": Policy,
    "groupings": Grouping,
    "architectures": Architecture,
    "evaluators": Evaluator,
    "export_formats": ExportFormat,
}
"""Hook name -> what the classes it returns must derive from."""


def _hook(self: object) -> list[type[Component]]:
    """Classes of the role that the hook is named after."""
    return []


Hooks = type("Hooks", (), dict.fromkeys(ROLES, hookspec(_hook)))
"""The specifications that pluggy compares implementations with: one hook per role."""
