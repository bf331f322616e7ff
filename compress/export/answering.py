"""``prunekit generate``: opens what answers, asks it, and writes the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...registry import SpecError
from ..calibration.passes import Progress
from ..calibration.statistics_file import StatisticsFile
from ..models.exported.manifest import MANIFEST
from ..models.loading import Loaded, load
from ..models.source import ModelSource, source_data
from ..output import printing
from ..output.folders import plain
from ..pruning.pruned import Pruned
from ..runs.matching import prune_as_asked
from ..runs.pipeline import calibration_of
from . import reload
from .command import source_of
from .exporting import check_cut_alone
from .generating import Generated, by_kind


@dataclass(frozen=True)
class Opened:
    """A loaded model that answers: pruned in place (``pruned``), exported, or as it is."""

    loaded: Loaded
    title: str
    pruned: Pruned | None = None
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of an exported model: kept units and all units by kind of site."""


@contextmanager
def opened(
    source: str,
    settings: Sequence[str],
    plugins: Sequence[Path],
    device: str,
    base: str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> Iterator[Opened]:
    """The model of a pipeline file or a results folder, pruned as it says; of an exported folder; or any other.

    Raises :class:`SpecError` for settings of what has no pipeline, and the errors of loading and pruning.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml") or (path / "resolved.yaml").is_file():
        placed = [] if device == "auto" else [f"model.device={device}"]
        with _pipeline(path, [*settings, *placed], plugins, progress) as found:
            yield found
        return
    if settings:
        raise SpecError(f"--set {settings[0]}: {source} is not a pipeline file, and only those have keys; leave it out")
    if (path / MANIFEST).is_file():
        export = reload.load(path, device=device, base=base, plugins=plugins, trust_remote_code=trust_remote_code)
        manifest = export.manifest
        sites = [(kind, kept) for layer in manifest.layers for kind, kept in layer.sites.items()]
        kept = by_kind((kind, found.kept, found.units) for kind, found in sites)
        yield Opened(export.loaded, f"{manifest.strategy}, exported", export.pruned, kept)
        return
    yield Opened(load(ModelSource.model_validate({**source_data(source), "device": device})), "not pruned")


@contextmanager
def _pipeline(path: Path, settings: Sequence[str], plugins: Sequence[Path], progress: Progress) -> Iterator[Opened]:
    spec, _ = source_of(path, settings, plugins)
    printing.catalog_problems(spec.catalog)
    check_cut_alone(spec)
    torch.manual_seed(spec.seed)
    loaded = load(spec.model)
    calibrates, file = spec.prune.needs_calibration, spec.calibration.statistics
    with prune_as_asked(
        spec,
        loaded,
        spec.prune,
        progress,
        calibration=calibration_of(spec.calibration, loaded, progress)[0] if calibrates else None,
        catalog=spec.catalog,
        statistics=StatisticsFile(file) if file is not None and calibrates else None,
        runtime=spec.runtime,
    ) as pruned:
        yield Opened(loaded, spec.prune.name, pruned)


def as_data(models: Mapping[str, Generated]) -> dict[str, Any]:
    """Answers and measurements of the models that answered, by their titles, as plain data."""
    return {
        title: {**plain(found.record), "answers": [answer.record for answer in found.answers]}
        for title, found in models.items()
    }


def lines(models: Sequence[Generated]) -> list[str]:
    """A line of JSON for each prompt: the answer and its counts, and those of the dense model under ``dense``."""
    own, *others = models
    found = []
    for number, answer in enumerate(own.answers):
        record = answer.record
        if others:
            other = others[0].answers[number]
            record["dense"] = {k: v for k, v in other.record.items() if k not in other.prompt.record}
        found.append(json.dumps(record, ensure_ascii=False))
    return found
