"""Measures a loaded model with evaluators that need no second model, and writes and reads evaluators in manifests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...registry import Catalog, DataError, Evaluator, Measurement, SpecError
from ...registry.roles.evaluation import checked
from ..calibration.passes import Progress, no_progress
from ..files.spec import SpecReader
from ..models.exported.manifest import ExportMetric
from ..models.loading import Loaded
from ..pruning.pruned import Pruned
from ..runs.measuring import Measuring, Unpruned


def repeatable(evaluators: Iterable[Evaluator]) -> tuple[Evaluator, ...]:
    """The evaluators that need neither a second model nor a clock: they measure the same values again later."""
    return tuple(evaluator for evaluator in evaluators if not evaluator.paired)


def measure(
    evaluator: Evaluator,
    loaded: Loaded,
    seed: int,
    label: str,
    pruned: Pruned | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """Run one evaluator on a loaded model, which may be pruned per batch."""
    if pruned is not None:
        return Measuring(loaded, pruned, progress, {}, (), seed).measure(evaluator)

    torch.manual_seed(seed)
    return checked(evaluator, evaluator.evaluate(Unpruned(loaded, label, progress)))


def record(evaluator: Evaluator) -> dict[str, Any]:
    """An evaluator's name and options, as a manifest holds them."""
    return evaluator.model_dump(mode="json", serialize_as_any=True)


def recorded(metric: ExportMetric, plugins: Sequence[Path] = (), trust: bool = False) -> Evaluator:
    """The evaluator that a manifest records for a metric.

    Raises :class:`SpecError` if its text is missing, or if it names a folder of tasks, whose files may bring code,
    without ``trust``.
    """
    tasks = metric.evaluator.get("task_folder")
    if tasks and not trust:
        raise SpecError(
            f"{metric.label} was measured with the tasks in {tasks}, whose files may run code; read them, then "
            "allow it (verify --trust-remote-code)"
        )
    reader = SpecReader(Catalog.discover(plugins), Path.cwd())
    built = reader.component("evaluators", metric.evaluator, ())
    evaluator = reader.result(built, f"the export was measured by {metric.label}")
    if not isinstance(evaluator, Evaluator):
        raise DataError(f"the evaluator recorded for {metric.label} cannot be built; export the model again")
    return evaluator
