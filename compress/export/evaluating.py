"""``prunekit evaluate``: measures a model, or an exported one, as it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from ...registry import Catalog, Evaluator, Measurement, SpecError
from ..calibration.passes import Progress, no_progress
from ..files.reader import with_rows
from ..files.spec import PipelineSpec, SpecReader
from ..files.yaml_file import YamlFile, read_yaml
from ..models.exported.manifest import MANIFEST, Manifest, read_manifest
from ..models.loading import Loaded, load
from ..models.source import source_data
from ..output.folders import RunFolder
from ..output.records import Ratio
from ..pruning.pruned import Pruned
from ..runs.measuring import Measuring, Unpruned
from ..runs.pipeline import check_lengths, labelled, pinned
from ..runs.plan import Say, planned, silent
from ..runs.preflight import mistakes
from ..runs.provenance import about_model, plugins_used, versions
from ..runs.records import FORMAT, NOT_PRUNED, EvaluatorResult, RunResult, Seconds
from ..runs.results import Results
from . import reload
from .measures import measure

UNPRUNED = {"use": "magnitude", "ratio": 0.0}
"""A pruning that cuts nothing, for the pipeline file of a model that is measured as it is."""


def evaluate(
    model: nn.Module | Pruned | Loaded | reload.Export,
    evaluator: str | Evaluator = "perplexity",
    *,
    tokenizer: Any = None,
    catalog: Catalog | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    **options: Any,
) -> Measurement:
    """Measure a model that is loaded: as it is, or pruned if it is a handle of :func:`~prunekit.compress.prune`.

    ``evaluator`` is a name or an object, ``options`` are its keys in a pipeline file. ``tokenizer`` is needed by
    whatever reads text; what :func:`~prunekit.compress.load` returns has its own. A handle's histories are as
    calibrated before and after. Raises :class:`SpecError` (options that cannot work), and the evaluator's errors.
    """
    net, tokenizer, pruned = parts_of(model, tokenizer, "evaluate", "to measure a model by its name")
    catalog = catalog or (pruned.catalog if pruned is not None else Catalog.discover())
    reader = SpecReader(catalog, Path.cwd())
    raw = {"name": evaluator, **options} if isinstance(evaluator, str) else evaluator
    if options and not isinstance(evaluator, str):
        key = next(iter(options))
        raise SpecError(f"evaluate: the evaluator is an object, which has its options; leave {key} out")
    built = reader.result(reader.component("evaluators", raw, ()), "evaluate")
    assert isinstance(built, Evaluator)
    loaded = Loaded(net, _NoTokenizer(built.name) if tokenizer is None else tokenizer, {"name": type(net).__name__})
    if pruned is not None and pruned.strategy.refuses_long_batches:
        built = with_rows(built, pruned.cuts[0].history.positions)
    built.check_options()
    built.check(net)
    return measure(built, loaded, seed, "model", pruned, progress)


def parts_of(model: Any, tokenizer: Any, command: str, aim: str) -> tuple[nn.Module, Any, Pruned | None]:
    """The model itself, its tokenizer where it is known, and the handle of a pruned one.

    Raises :class:`SpecError` for anything but a loaded model; ``command`` does with its name what ``aim`` says.
    """
    pruned = model if isinstance(model, Pruned) else getattr(model, "pruned", None)
    if isinstance(model, (Loaded, reload.Export)):
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
    net = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(net, nn.Module):
        raise SpecError(
            f"{command}: expected a loaded model or what prune() returned, found {model!r:.80}; {aim} use prunekit "
            f"{command}"
        )
    return net, tokenizer, pruned


class _NoTokenizer:
    """Stands for a tokenizer that was not given: whatever reads text is refused."""

    def __init__(self, evaluator: str):
        self._evaluator = evaluator

    def __getattr__(self, name: str) -> Any:
        raise SpecError(f"evaluate: {self._evaluator} reads text; pass tokenizer=")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__getattr__("call")


def run(
    source: str | None,
    settings: Sequence[str] = (),
    plugins: Sequence[Path] = (),
    out: Path | None = None,
    overwrite: bool = False,
    base: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = no_progress,
    say: Say = silent,
) -> Results:
    """Measure the model of ``source`` and write a results folder.

    ``source`` is a hub id, a model's folder, an exported folder, or a pipeline file, whose ``prune`` and ``recover``
    are not used; None is the bundled model. Raises :class:`SpecError` for mistakes, the errors of loading, and the
    evaluators' own.
    """
    began, started = time.perf_counter(), datetime.now(timezone.utc).isoformat(timespec="seconds")
    manifest = _manifest(source)
    spec = _read(source, manifest, settings, plugins)
    name = Path(source or "bundled").stem or "model"
    default = Path("results") / f"evaluate-{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunFolder(out or Path(spec.output.dir or default), overwrite or spec.output.overwrite)
    with folder.open() as partial:
        pruned = None
        if manifest is not None and manifest.profile == "dynamic":
            found = reload.load(
                str(source), device=spec.model.device, base=base, plugins=plugins, trust_remote_code=trust_remote_code
            )
            loaded, pruned = found.loaded, found.pruned
        else:
            loaded = load(spec.model)
        check_lengths(spec, loaded)
        for line in planned(None, labelled(spec.evaluate), Unpruned(loaded), "the model as it is"):
            say(line)
        measuring = None
        if pruned is not None:
            measuring = Measuring(loaded, pruned, progress, {}, spec.evaluate, spec.seed, spec.positions)
        metrics = []
        for label, evaluator in labelled(spec.evaluate):
            start = time.perf_counter()
            if measuring is not None:
                measured = measuring.measure(evaluator)
            else:
                measured = measure(evaluator, loaded, spec.seed, name, progress=progress)
            metrics.append(_result(label, evaluator, measured, manifest is None, time.perf_counter() - start))
        record = RunResult(
            format=FORMAT,
            started=started,
            strategy=NOT_PRUNED if manifest is None else manifest.strategy,
            ratio=Ratio(units_cut=0.0, prunable_parameters_cut=0.0) if manifest is None else manifest.ratio,
            metrics=metrics,
            model=about_model(loaded),
            calibration=None if manifest is None else manifest.calibration,
            compensation=None if manifest is None else manifest.compensation,
            attention_unit=spec.prune.attention_unit if manifest is None else manifest.attention_unit,
            layers=[] if manifest is None else manifest.layers,
            seeds={"pipeline": spec.seed},
            versions=versions(),
            plugins=plugins_used(spec),
            notes=[note for metric in metrics for note in metric.notes],
            seconds=Seconds(total=round(time.perf_counter() - began, 2)),
        )
        results = Results(record, pinned(spec, loaded).to_yaml())
        results.write(partial)
    results.folder = folder.target
    return results


def _result(label: str, evaluator: Evaluator, measured: Measurement, is_dense: bool, seconds: float) -> EvaluatorResult:
    """A measurement as results.json has it; a paired evaluator's second measurement of the same model is left out."""
    values = {key: value for key, value in measured.values.items() if not key.startswith("dense_")}
    return EvaluatorResult(
        evaluator=evaluator.name,
        label=label,
        dense=values if is_dense else None,
        pruned=values,
        protocol=measured.protocol,
        details={"pruned": measured.details} if measured.details else {},
        notes=[f"{label}: {note}" for note in measured.notes],
        seconds=round(seconds, 2),
    )


def _manifest(source: str | None) -> Manifest | None:
    folder = None if source is None else Path(source).expanduser()
    return read_manifest(folder) if folder is not None and (folder / MANIFEST).is_file() else None


def _read(
    source: str | None, manifest: Manifest | None, settings: Sequence[str], plugins: Sequence[Path]
) -> PipelineSpec:
    """The pipeline of what is measured: that of a dynamic export, else one that cuts nothing."""
    path = Path(source or "").expanduser()
    if source is not None and path.suffix in (".yaml", ".yml"):
        file = read_yaml(path)
        if file.is_study:
            raise SpecError(f"{path} is an ablation file; use prunekit ablate {path}")
        file.data["prune"] = dict(UNPRUNED)
        file.data.pop("recover", None)
    elif manifest is not None and manifest.profile == "dynamic":
        recipe = reload.recipe_of(path, plugins)
        kept = ("model", "architecture", "runtime", "seed")
        data = {key: recipe.model_dump(mode="json", serialize_as_any=True)[key] for key in kept}
        prune = recipe.prune.model_dump(mode="json", serialize_as_any=True)
        data["prune"] = {"use": prune.pop("name"), **prune}
        file = YamlFile(Path("evaluate"), "", data, {})
    else:
        model = {} if source is None else source_data(source)
        file = YamlFile(Path("evaluate"), "", {"model": model, "prune": dict(UNPRUNED)}, {})
    return PipelineSpec.load(file, settings, plugins, mistakes)
