"""The top floor: prune a loaded model, or run a pipeline file from calibration to report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ablation.store import Store
    from .export.evaluating import evaluate
    from .export.exporting import Exporter
    from .export.generating import generate
    from .export.reload import load
    from .files.spec import PipelineSpec
    from .models.architectures import AttentionNames, MlpNames, PreNormDecoder
    from .models.families import family
    from .pruning.checking import check_architecture
    from .pruning.prune import prune
    from .pruning.pruned import Pruned
    from .recovery.in_pipeline import Pipeline
    from .runs.records import read_results
    from .runs.text import calibration_batches

__all__ = [
    "AttentionNames",
    "Exporter",
    "MlpNames",
    "Pipeline",
    "PipelineSpec",
    "PreNormDecoder",
    "Pruned",
    "Store",
    "calibration_batches",
    "check_architecture",
    "evaluate",
    "family",
    "generate",
    "load",
    "prune",
    "read_results",
]

_HOMES = {
    "prune": "pruning.prune",
    "Pruned": "pruning.pruned",
    "check_architecture": "pruning.checking",
    "calibration_batches": "runs.text",
    "Pipeline": "recovery.in_pipeline",
    "PipelineSpec": "files.spec",
    "Exporter": "export.exporting",
    "load": "export.reload",
    "evaluate": "export.evaluating",
    "generate": "export.generating",
    "PreNormDecoder": "models.architectures",
    "AttentionNames": "models.architectures",
    "MlpNames": "models.architectures",
    "family": "models.families",
    "read_results": "runs.records",
    "Store": "ablation.store",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``prunekit --help`` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("prune", "Pruned"):
        importlib.import_module(".export.saving", __name__)  # registers what Pruned.save calls
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
