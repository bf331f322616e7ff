"""The pipeline: load once, calibrate and prune, measure dense and pruned in the same run, write the results."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from ...registry import Evaluator, Measurement, PluginError, SpecError
from ...registry.tensors.tokens import context_length
from ..calibration.passes import Progress, no_progress
from ..calibration.shared import SharedStatistics
from ..calibration.statistics_file import StatisticsFile, check_place
from ..files.spec import Calibration, PipelineSpec
from ..models.loading import Loaded, load
from ..output.failures import blamed
from ..output.folders import RunFolder
from ..output.records import CalibrationFacts, Training, Value
from ..pruning.pruned import Pruned
from .checking import flaws_of
from .documents import read_documents
from .matching import prune_as_asked
from .measuring import Known, Measuring, Unpruned
from .plan import Say, planned, silent
from .preflight import check_context, check_rows
from .provenance import about_cut, about_model, plugins_used, versions
from .records import FORMAT, EvaluatorResult, RunResult, Seconds, damages
from .results import Results
from .text import fingerprint as text_fingerprint
from .text import in_batches, sequences_of


class Recoverer(Protocol):
    """Trains one run's pruned model."""

    def __init__(self, spec: PipelineSpec, loaded: Loaded, /): ...

    def recover(self, pruned: Pruned, progress: Progress, /) -> Training:
        """Have ``pruned`` compute with trained weights, and describe the training."""
        ...


class Pipeline:
    """Runs a :class:`PipelineSpec`, or the mapping that a pipeline file would hold."""

    _recoverer: ClassVar[type[Recoverer] | None] = None
    """What trains pruned models. It raises, before hours of calibration, for a text that is too short and a model that
    cannot be trained. Recovery stands above this room, and sets it."""

    def __init__(self, spec: PipelineSpec | Mapping[str, Any]):
        self.spec = spec if isinstance(spec, PipelineSpec) else PipelineSpec.of(spec)

    @property
    def default_folder(self) -> Path:
        """Where the results go if neither the spec nor the caller says."""
        ratio = "" if self.spec.prune.ratio is None else f"-{self.spec.prune.ratio:g}"
        return Path("results") / f"{self.spec.prune.name}{ratio}-{datetime.now():%Y%m%d-%H%M%S}"

    def run(
        self,
        out: str | Path | None = None,
        progress: Progress = no_progress,
        loaded: Loaded | None = None,
        say: Say = silent,
        keep: bool = False,
    ) -> Results:
        """Run everything and write the results folder ``out`` (else ``output.dir``, else :attr:`default_folder`).

        The folder appears whole when all is done; an error or an interruption leaves nothing behind.
        ``loaded`` is the model, where it is loaded already; it is unpruned again afterwards. ``say`` gets the lines of
        the plan; ``keep`` is that of :meth:`measure`. Raises the errors of :func:`prune` and :class:`SpecError` for a
        folder that exists.
        """
        output = self.spec.output
        folder = RunFolder(Path(out or output.dir or self.default_folder), output.overwrite)
        with folder.open() as partial:
            results = self.measure(progress, loaded, say=say, keep=keep)
            results.write(partial)
        results.folder = folder.target
        return results

    def measure(
        self,
        progress: Progress = no_progress,
        loaded: Loaded | None = None,
        dense: Known | None = None,
        statistics: SharedStatistics | None = None,
        say: Say = silent,
        keep: bool = False,
    ) -> Results:
        """Run everything and write nothing.

        With ``keep`` an evaluator of a plugin that fails has no values but a note, and the others are kept; a plugin
        that changes the model is noted, too.
        Runs on one ``loaded`` model may share ``dense``, the measurements of the unpruned model, and ``statistics``,
        those of the calibration; both are filled here.
        """
        spec, began = self.spec, time.perf_counter()
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        torch.manual_seed(spec.seed)
        for evaluator in spec.evaluate:
            evaluator.check_options()
        file = spec.calibration.statistics
        if file is not None and not file.exists():
            check_place(file)
        loaded = loaded or load(spec.model)
        check_lengths(spec, loaded)
        recoverer = self._recovering(loaded)
        batches, calibration = None, None
        if spec.prune.needs_calibration:
            batches, calibration = calibration_of(spec.calibration, loaded, progress, statistics)
        if say is not silent:
            models = "dense and pruned" if spec.recover is None else "dense and recovered"
            for line in planned(calibration, labelled(spec.evaluate), Unpruned(loaded), models, spec.recover):
                say(line)
        stored = StatisticsFile(file) if file is not None and batches is not None else None
        prepared = time.perf_counter()
        trace: list[dict[str, Any]] = []
        metrics: list[EvaluatorResult] = []
        failed: list[str] = []
        with prune_as_asked(
            spec,
            loaded,
            spec.prune,
            progress,
            calibration=batches,
            trace=spec.output.trace,
            catalog=spec.catalog,
            statistics=statistics if stored is None else stored,
            runtime=spec.runtime,
        ) as pruned:
            calibrated = time.perf_counter()

            def take_trace(label: str | None) -> None:
                trace.extend({"evaluator": label, **record} for record in (pruned.trace or [])[len(trace) :])

            take_trace(None)
            recovery = None if recoverer is None else recoverer.recover(pruned, progress)
            known = {} if dense is None else dense
            measuring = Measuring(loaded, pruned, progress, known, spec.evaluate, spec.seed, spec.positions)
            for label, evaluator in labelled(spec.evaluate):
                try:
                    metrics.append(_evaluate(label, evaluator, measuring))
                except Exception as error:
                    message = str(error) if isinstance(error, PluginError) else blamed(error)
                    if not keep or message is None:
                        raise
                    failed.append(f"{label} has no values: {message}")
                    metrics.append(EvaluatorResult(evaluator=evaluator.name, label=label, pruned={}, notes=failed[-1:]))
                take_trace(label)
            cut, search = about_cut(pruned), pruned.search
            notes = [*flaws_of(spec), *pruned.notes]
        if pruned.changed:  # nobody but a plugin can have written to it
            if not keep:
                raise PluginError(f"{pruned.changed}; fix the plugin")
            failed.append(f"{pruned.changed}; all values may be wrong: fix the plugin")
            notes.append(failed[-1])
        ended = time.perf_counter()
        if calibration is not None and stored is not None:
            calibration = calibration.model_copy(update={"statistics": stored.used})
        # Absent where there is nothing, as in older files.
        more: dict[str, Any] = ({"search": search} if search else {}) | ({"recovery": recovery} if recovery else {})
        record = RunResult(
            format=FORMAT,
            started=started,
            strategy=spec.prune.name,
            ratio=cut.ratio,
            metrics=metrics,
            model=about_model(loaded),
            calibration=calibration,
            compensation=cut.compensation,
            attention_unit=cut.attention_unit,
            layers=cut.layers,
            runtime=spec.runtime.model_dump(mode="json"),
            seeds={"pipeline": spec.seed, "calibration": spec.calibration.seed, "strategy": spec.prune.seed},
            versions=versions(),
            plugins=plugins_used(spec),
            **more,
            notes=[
                *notes,
                *damages(metrics, recovery is not None),
                *(note for metric in metrics for note in metric.notes),
            ],
            seconds=Seconds(
                load=round(prepared - began, 2),
                prune=round(calibrated - prepared, 2),
                total=round(ended - began, 2),
            ),
        )
        return Results(record, pinned(spec, loaded).to_yaml(), trace if spec.output.trace else None, failed=failed)

    def _recovering(self, loaded: Loaded) -> Recoverer | None:
        """What trains the pruned model; None where it is measured as it was cut."""
        if self.spec.recover is None:
            return None
        if self._recoverer is None:
            raise SpecError("recover: import Pipeline from prunekit.compress, which training belongs to")
        return self._recoverer(self.spec, loaded)


def _evaluate(label: str, evaluator: Evaluator, measuring: Measuring) -> EvaluatorResult:
    """One evaluator's values, dense and pruned."""
    began = time.perf_counter()
    dense: dict[str, Value] | None = None
    details: dict[str, Any] = {}
    notes: list[str] = []
    if not evaluator.paired:
        unpruned = measuring.measure(evaluator, dense=True)
        dense, details["dense"] = dict(unpruned.values), unpruned.details
        notes = [f"{label}, dense: {note}" for note in unpruned.notes]
        notes += published_warnings(measuring.loaded, unpruned)
    measured = measuring.measure(evaluator)
    notes += [f"{label}: {note}" for note in measured.notes]
    pruned: dict[str, Value] = dict(measured.values)
    details["pruned"] = measured.details
    if evaluator.paired:
        dense = {key.removeprefix("dense_"): value for key, value in pruned.items() if key.startswith("dense_")}
        pruned = {key: value for key, value in pruned.items() if not key.startswith("dense_")}
    return EvaluatorResult(
        evaluator=evaluator.name,
        label=label,
        dense=dense,
        pruned=pruned,
        protocol=measured.protocol,
        details={key: found for key, found in details.items() if found},
        notes=list(dict.fromkeys(notes)),
        seconds=round(time.perf_counter() - began, 2),
    )


def calibration_of(
    calibration: Calibration,
    loaded: Loaded,
    progress: Progress = no_progress,
    statistics: SharedStatistics | None = None,
) -> tuple[list, CalibrationFacts]:
    """Calibration batches and their description.

    ``statistics`` remembers generated text. Raises :class:`DataError` where sequences exceed the model's context.
    """
    check_context("calibration.length", calibration.length, context_length(loaded.model))
    tokenizer, sources = loaded.tokenizer, calibration.sources
    shares = [len(range(first, calibration.sequences, len(sources))) for first in range(len(sources))]
    length, seed, parts = calibration.length, calibration.seed, []
    for source, share in zip(sources, shares, strict=True):
        if source.generated is None:
            documents = read_documents(source, tokenizer)
            part = sequences_of(tokenizer, documents, share, length, seed, source.label, texts=len(sources))
        else:
            known = {} if statistics is None else statistics.generated
            key = (source.generated, share, length, calibration.batch_size, seed)
            if key not in known:
                known[key] = source.generated.sequences(loaded.model, tokenizer, *key[1:], progress)
            part = known[key]
        parts.append(part)
    batches = in_batches(torch.cat(parts), calibration.batch_size)
    return batches, CalibrationFacts(
        text=calibration.label,
        sequences=calibration.sequences,
        length=calibration.length,
        batch_size=calibration.batch_size,
        seed=calibration.seed,
        fingerprint=text_fingerprint(batches),
    )


def pinned(spec: PipelineSpec, loaded: Loaded) -> PipelineSpec:
    """``spec`` with the hub commit and the dtype that were really loaded."""
    model = spec.model.model_copy(
        update={
            "revision": loaded.identity["commit"] or spec.model.revision,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        }
    )
    return spec.model_copy(update={"model": model})


def check_lengths(spec: PipelineSpec, loaded: Loaded) -> None:
    """Raise, before hours of calibration, for evaluators that do not fit the model or the history.

    The error is the evaluator's own, or :class:`DataError` for batches that will be longer than the history.
    """
    for evaluator in spec.evaluate:
        evaluator.check(loaded.model)
    for index in range(len(spec.evaluate)):
        check_rows(spec, index, context_length(loaded.model))


def labelled(evaluators: tuple[Evaluator, ...]) -> list[tuple[str, Evaluator]]:
    """Evaluators with the names that results call them by: several of one kind are numbered."""
    total = Counter(evaluator.name for evaluator in evaluators)
    seen: Counter[str] = Counter()
    found = []
    for evaluator in evaluators:
        seen[evaluator.name] += 1
        number = f" {seen[evaluator.name]}" if total[evaluator.name] > 1 else ""
        found.append((evaluator.name + number, evaluator))
    return found


def published_warnings(loaded: Loaded, dense: Measurement) -> list[str]:
    """A warning where a known model's dense perplexity is far from what its protocol should give."""
    from ...evaluators.published_perplexities import check_published

    warning = check_published(loaded.identity["name"], dense.protocol, dense.values)
    return [warning] if warning else []
