"""What a model that was loaded again measures: the evaluators that look at one model alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ...registry import Catalog, DataError, Evaluator, Measurement, SpecError, Subject
from ...registry.roles.evaluation import checked
from ..calibration.passes import Progress, no_progress
from ..files.spec import SpecReader
from ..models.loading import Loaded
from ..pruning.pruned import Pruned
from ..runs.measuring import Measuring
from ..runs.text import read_documents


def repeatable(evaluators: Iterable[Evaluator]) -> tuple[Evaluator, ...]:
    """Those that need no second model and no clock, so that whoever measures later must find the same."""
    return tuple(evaluator for evaluator in evaluators if not evaluator.paired)


def measure(
    evaluator: Evaluator,
    loaded: Loaded,
    seed: int,
    label: str,
    pruned: Pruned | None = None,
    progress: Progress = no_progress,
) -> Measurement:
    """One evaluator on a loaded model, or on one that is pruned per batch."""
    if pruned is not None:
        return Measuring(loaded, pruned, progress, {}, (), seed).measure(evaluator)

    def track(items: Iterator, what: str, total: int) -> Iterator:
        return progress(items, f"{label}: {what}", total)

    torch.manual_seed(seed)
    model = loaded.model
    subject = Subject(
        model=model,
        tokenizer=loaded.tokenizer,
        read=read_documents,
        dense=nullcontext,
        parameters=lambda: sum(parameter.numel() for parameter in model.parameters()),
        progress=track,
    )
    return checked(evaluator, evaluator.evaluate(subject))


def entry(evaluator: Evaluator, measured: Measurement) -> dict[str, Any]:
    """How a manifest records by what something was measured, and how."""
    return {"evaluator": evaluator.model_dump(mode="json", serialize_as_any=True), "protocol": measured.protocol}


def recorded(metric: dict[str, Any], plugins: Sequence[Path] = (), trust: bool = False) -> Evaluator:
    """The evaluator that a manifest recorded for a metric.

    Raises :class:`SpecError` where its text is not there, or where it names a folder of tasks, whose files may bring
    code, and nobody said that they are to be trusted.
    """
    tasks = metric["evaluator"].get("task_folder")
    if tasks and not trust:
        raise SpecError(
            f"{metric['label']} was measured with the tasks in {tasks}, whose files may run code; read them, then say "
            "so (verify --trust-remote-code)"
        )
    reader = SpecReader(Catalog.discover(plugins), Path.cwd())
    built = reader.component("evaluators", metric["evaluator"], ())
    reader.finish(f"the export was measured by {metric['label']}")
    if built is None:
        raise DataError(f"the evaluator recorded for {metric['label']} cannot be built; export the model again")
    return built
