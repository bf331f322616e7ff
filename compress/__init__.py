"""The top floor: prune a loaded model, or run a pipeline file from calibration to report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export.evaluating import evaluate
    from .export.exporting import Exporter
    from .export.reload import load
    from .files.spec import PipelineSpec
    from .pruning.prune import prune
    from .pruning.pruned import Pruned
    from .runs.pipeline import Pipeline

__all__ = ["Exporter", "Pipeline", "PipelineSpec", "Pruned", "evaluate", "load", "prune"]

_HOMES = {
    "prune": "pruning.prune",
    "Pruned": "pruning.pruned",
    "Pipeline": "runs.pipeline",
    "PipelineSpec": "files.spec",
    "Exporter": "export.exporting",
    "load": "export.reload",
    "evaluate": "export.evaluating",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``prunekit --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
