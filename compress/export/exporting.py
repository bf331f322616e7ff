"""``prunekit export``: prune, write, load again, compare and measure; the folder appears when all of it succeeded."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from ...registry import Evaluator, Measurement, ModelError, SpecError
from ..calibration.passes import Progress, no_progress
from ..calibration.statistics_file import StatisticsFile
from ..engine.runtime import Runtime
from ..files.spec import PipelineSpec
from ..models.exported.classes import needs
from ..models.exported.manifest import (
    CARD,
    MANIFEST,
    RECIPE,
    ExportMetric,
    ExportOptions,
    Frozen,
    LogitCheck,
    Manifest,
    Parameters,
    RunFacts,
    write_kept,
    write_manifest,
)
from ..models.loading import Loaded, fingerprint, load, outline_of
from ..output.folders import RunFolder
from ..output.records import CalibrationFacts, Cut
from ..pruning.freezing import MEANINGS, Freeze
from ..pruning.pruned import Pruned
from ..runs.matching import prune_as_asked
from ..runs.measuring import Measuring, Unpruned
from ..runs.pipeline import calibration_of, check_lengths, labelled, pinned
from ..runs.plan import Say, planned, silent
from ..runs.provenance import about_cut, about_model, plugins_used, versions
from ..runs.records import RunResult
from . import dynamic_state
from .card import card
from .comparing import check_tokenizer, compared, logits_of, some_tokens
from .constraint import rounding
from .family import Family
from .formats import write_format
from .licence import copy_licence_files, licence_of
from .measures import measure, record, repeatable
from .profiles import Profile, asked_for, check_freezing
from .reload import source_of
from .weights import SHARD_SIZE, check_shard_size
from .writing import check_counts, check_possible, check_vocabulary, write_model


def repeated(evaluators: tuple[Evaluator, ...]) -> list[tuple[str, Evaluator]]:
    """The evaluators that are run on the written model again, with their labels."""
    return [(label, each) for label, each in labelled(evaluators) if each in repeatable(evaluators)]


def check_cut_alone(spec: PipelineSpec) -> None:
    """Raise :class:`SpecError` for a pipeline that trains after the cut, which a command would leave out."""
    if spec.recover is not None:
        raise SpecError(
            "recover: prunekit run and ablate train a model after the cut, and this takes the cut alone; add --set "
            "recover=null, and train the exported folder (prunekit recover DIR --out DIR2)"
        )


MeasuredBefore = tuple[str, Evaluator, Measurement, Measurement | None]
"""Label, evaluator, the dense model's values and, before freezing, those of the decisions per batch."""


@dataclass
class Exporter:
    """One export: ``spec`` pruned and written as ``profile`` into the folder ``out``.

    ``multiple``: kept MLP widths are multiples of it. ``freeze``: how the decisions per batch are replaced by one.
    ``run``: the results of the run of ``spec``, whose measurements are then kept in the manifest.
    """

    spec: PipelineSpec
    profile: str
    out: Path
    multiple: int | None = None
    freeze: Freeze | None = None
    shard_size: str = SHARD_SIZE
    overwrite: bool = False
    run: RunResult | None = None
    progress: Progress = no_progress
    say: Say = silent
    """Gets the lines of the plan."""
    _notes: list[str] = field(default_factory=list, init=False)

    def export(self) -> Manifest:
        """Write the folder, and return its manifest.

        Raises :class:`SpecError` for a cut that the profile cannot hold, naming the nearest one that can, and the
        errors of :func:`~prunekit.compress.prune`. After an error there is no folder.
        """
        self._notes = []
        spec = self.spec
        profile, own = asked_for(self.profile, spec.catalog)
        folder = RunFolder(Path(self.out), self.overwrite, "exported folder", MANIFEST)
        self._check_options(folder)
        strategy = profile.constraint(self.multiple).on(spec.prune)
        outline = outline_of(spec.model)
        if outline is not None:
            check_possible(profile, outline, strategy, spec.catalog)
            if own is not None:
                own.check(outline.config)
        check_freezing(profile, spec.prune, self.freeze)
        loaded = load(spec.model)
        self._check_run(loaded)
        check_lengths(spec.model_copy(update={"evaluate": repeatable(spec.evaluate)}), loaded)
        if outline is None:
            check_possible(profile, loaded.model, strategy, spec.catalog)
            if own is not None:
                own.check(loaded.model.config)
        check_vocabulary(profile, loaded)
        torch.manual_seed(spec.seed)
        calibrates = spec.prune.needs_calibration
        batches, calibration = None, None
        if calibrates or self.freeze in ("mean-score", "last"):
            batches, calibration = calibration_of(spec.calibration, loaded, self.progress)
        file = spec.calibration.statistics
        statistics = StatisticsFile(file) if file is not None and calibrates else None
        models = "dense, and the written model" if self.freeze is None else "dense, per batch, and the written model"
        if self.say is not silent:
            for line in planned(calibration, repeated(spec.evaluate), Unpruned(loaded), models):
                self.say(line)
        base = about_model(loaded)
        pruned = prune_as_asked(
            spec,
            loaded,
            strategy,
            self.progress,
            calibration=batches if calibrates else None,
            catalog=spec.catalog,
            statistics=statistics,
            runtime=self._runtime,
        )
        if statistics is not None and calibration is not None:
            calibration = calibration.model_copy(update={"statistics": statistics.used})
        with pruned, folder.open() as partial:
            family = Family.of(loaded.model.config, spec.catalog, strategy.experts)
            check_counts(profile, loaded.model, strategy, pruned.all_sites, pruned.counts, family)
            before = self._measure_before(loaded, pruned)
            if self.freeze is not None:
                pruned.freeze(self.freeze, batches, self.progress)
            cut, effect = about_cut(pruned), rounding(pruned)
            active = pruned.active_parameters()
            ids = some_tokens(loaded, batches)
            name = folder.target.name
            self._notes += [*pruned.notes]
            self._notes += write_model(profile, pruned, loaded.tokenizer, partial, self.shard_size, name)
            if profile.needs_one_cut:
                write_kept(partial, pruned.sites_kept)
            (partial / RECIPE).write_text(pinned(spec, loaded).to_yaml(), encoding="utf-8")
            self._notes += copy_licence_files(spec.model, partial)
            again, handle, check = self._load_again(profile, loaded, pruned, partial, ids)
            with handle or nullcontext():
                # A GGUF is not loaded here, so its weights have no fingerprint.
                weights = None if check is None else fingerprint(again.model)
                exported = active if check is None else sum(p.numel() for p in again.model.parameters())
                metrics = [self._metric(found, again, handle) for found in before]
                if own is not None:
                    self._notes += write_format(own, again, partial)
            run = self._run_facts(cut, calibration)
            manifest = Manifest(
                profile=profile.name,
                created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                strategy=spec.prune.name,
                options=ExportOptions(multiple=self.multiple, freeze=self.freeze, shard_size=self.shard_size),
                freeze=self._frozen(),
                recovery=None,
                requires=needs() if profile.name == "hf-hetero" else {},
                base=base,
                license=licence_of(spec.model),
                calibration=calibration,
                seeds={"pipeline": spec.seed, "calibration": spec.calibration.seed, "strategy": spec.prune.seed},
                versions=versions(),
                plugins=plugins_used(spec),
                plugin_files=[path.name for path in spec.plugins],
                metrics=metrics,
                ratio=cut.ratio,
                compensation=cut.compensation,
                attention_unit=cut.attention_unit,
                layers=cut.layers,
                rounding=effect,
                parameters=Parameters(dense=base.parameters, active=active, exported=exported),
                weights=weights,
                check=check,
                run=run,
                notes=list(dict.fromkeys(self._notes)),
                files={},
            )
            (partial / CARD).write_text(card(manifest, name), encoding="utf-8")
            return write_manifest(partial, manifest)

    def _check_options(self, folder: RunFolder) -> None:
        """Raise for a wrong option before anything is loaded."""
        folder.check()
        check_cut_alone(self.spec)
        name = self.spec.model.name
        if name is not None and Path(name).expanduser().resolve() == folder.target:
            raise SpecError(f"--out names the model that is to be pruned ({folder.target}); choose another folder")
        for evaluator in repeatable(self.spec.evaluate):
            evaluator.check_options()
        check_shard_size(self.shard_size)

    @property
    def _runtime(self) -> Runtime:
        """The pipeline's runtime without compilation, which takes longer than it saves in a few batches."""
        return self.spec.runtime.model_copy(update={"compile": None})

    def _check_run(self, loaded: Loaded) -> None:
        """Raise :class:`ModelError` if the run was of other weights."""
        known = None if self.run is None else self.run.model.fingerprint
        if known is not None and known != fingerprint(loaded.model):
            raise ModelError(
                f"the run was of other weights of {self.spec.model.label} than are there now (fingerprint "
                f"{known[:12]}...); export the pipeline file itself, or name the model that was run"
            )

    def _frozen(self) -> Frozen | None:
        if self.freeze is None:
            return None
        once = "units chosen once, and the calibrated mean"
        return Frozen(how=self.freeze, meaning=MEANINGS[self.freeze] if self.spec.prune.dynamic else once)

    def _measure_before(self, loaded: Loaded, pruned: Pruned) -> list[MeasuredBefore]:
        """Measure the dense model and, if decisions will be frozen, the model that decides per batch."""
        evaluators = self.spec.evaluate
        measuring = Measuring(loaded, pruned, self.progress, {}, evaluators, self.spec.seed)
        return [
            (
                label,
                evaluator,
                measuring.measure(evaluator, dense=True),
                None if self.freeze is None else measuring.measure(evaluator),
            )
            for label, evaluator in repeated(evaluators)
        ]

    def _load_again(
        self, profile: Profile, loaded: Loaded, pruned: Pruned, partial: Path, ids: Tensor
    ) -> tuple[Loaded, Pruned | None, LogitCheck | None]:
        """Load the written model, with its pruning if it decides per batch, and compare its logits for ids (b, t).

        One model is in memory at a time. A GGUF is not loaded: transformers measures the weights written to it.
        """
        if profile.name == "gguf":
            self._notes.append(
                "measured in transformers before the weights went to the GGUF; prunekit verify measures the file "
                "itself where llama-cpp-python is installed"
            )
            return loaded, pruned, None
        expected, dtype = logits_of(loaded.model, ids, pruned), loaded.model.dtype
        pruned.remove()
        handle = None
        if profile.name == "dynamic":
            again = loaded
            handle = dynamic_state.restore(loaded.model, self.spec.prune, self.spec.catalog, partial, self._runtime)
        else:
            pruned.forget()
            loaded.model = None
            again = load(source_of(partial, self.spec.model), check=False)
            check_tokenizer(loaded.tokenizer, again.tokenizer)
        try:
            alike = profile.name in ("hf-hetero", "dynamic")
            return again, handle, compared(expected, logits_of(again.model, ids, handle), dtype, alike)
        except BaseException:
            if handle is not None:
                handle.remove()
            raise

    def _metric(self, before: MeasuredBefore, again: Loaded, handle: Pruned | None) -> ExportMetric:
        """Measure the written model, and combine its values with those measured before."""
        label, evaluator, dense, per_batch = before
        found = measure(evaluator, again, self.spec.seed, self.profile, handle, self.progress)
        self._notes += [f"{label}: {note}" for note in found.notes]
        return ExportMetric(
            label=label,
            dense=dense.values,
            per_batch=None if per_batch is None else per_batch.values,
            evaluator=record(evaluator),
            protocol=found.protocol,
            exported=found.values,
        )

    def _run_facts(self, cut: Cut, calibration: CalibrationFacts | None) -> RunFacts | None:
        """The measurements of the run, if its cut is the exported one; otherwise a note."""
        if self.run is None:
            return None
        texts = [None if facts is None else facts.fingerprint for facts in (self.run.calibration, calibration)]
        if self.freeze is not None or self.run.layers != cut.layers or texts[0] != texts[1]:
            self._notes.append(
                "the run's other measurements are of another cut (frozen, rounded or calibrated on another text)"
            )
            return None
        return RunFacts(started=self.run.started, metrics=[metric.as_json() for metric in self.run.metrics])
