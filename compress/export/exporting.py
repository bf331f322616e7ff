"""``prunekit export``: prune, write, load again, compare, measure; the folder appears when all of that went well."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...registry import ModelError, SpecError
from ..calibration.passes import Progress, no_progress
from ..calibration.statistics_file import StatisticsFile
from ..engine.runtime import Runtime
from ..files.spec import PipelineSpec
from ..models.exported.classes import needs
from ..models.exported.manifest import CARD, MANIFEST, RECIPE, finish, write_kept
from ..models.loading import Loaded, fingerprint, load
from ..output.folders import RunFolder
from ..pruning.freezing import MEANINGS
from ..pruning.prune import prune
from ..pruning.pruned import Pruned
from ..runs.measuring import Measuring
from ..runs.pipeline import calibration_of, check_lengths, labelled, pinned
from ..runs.provenance import about_cut, about_model, notes_on_cut, plugins_used, versions
from ..runs.records import CalibrationFacts, RunResult
from . import reload
from .card import card
from .checks import check_freezing
from .comparing import check_tokenizer, compared, logits_of, some_tokens
from .constraint import rounding
from .licence import copy_licence_files, licence_of
from .measures import entry, measure, repeatable
from .profiles import profile_named
from .weights_file import SHARD_SIZE, check_shard_size
from .writing import check_possible, write_model


@dataclass
class Exporter:
    """One export: ``spec`` pruned and written as ``profile`` into the folder ``out``.

    ``multiple``: kept MLP widths are multiples of it. ``freeze``: how a strategy that decides per batch is made to
    decide once. ``run`` is results.json of the run that ``spec`` comes from, whose measurements are then taken over.
    """

    spec: PipelineSpec
    profile: str
    out: Path
    multiple: int | None = None
    freeze: str | None = None
    shard_size: str = SHARD_SIZE
    overwrite: bool = False
    run: RunResult | None = None
    progress: Progress = no_progress
    manifest: dict[str, Any] = field(default_factory=dict, init=False)
    _notes: list[str] = field(default_factory=list, init=False)

    def export(self) -> dict[str, Any]:
        """Do it, and return the manifest.

        Raises :class:`SpecError` for what cannot be written so, naming the nearest that can, and the errors of
        :func:`~prunekit.compress.prune`. Whatever fails, no folder is left.
        """
        self._profile, self._notes = profile_named(self.profile), []
        profile = self._profile
        spec = self.spec
        folder = RunFolder(Path(self.out), self.overwrite, "exported folder", MANIFEST)
        folder.check()
        if spec.model.name is not None and Path(spec.model.name).expanduser().resolve() == folder.target:
            raise SpecError(f"--out names the model that is to be pruned ({folder.target}); choose another folder")
        for evaluator in repeatable(spec.evaluate):
            evaluator.check_options()
        strategy = profile.constraint(self.multiple).on(spec.prune)
        check_freezing(profile, spec.prune, self.freeze)
        check_shard_size(self.shard_size)
        loaded = load(spec.model)
        self._check_run(loaded)
        check_lengths(spec.model_copy(update={"evaluate": repeatable(spec.evaluate)}), loaded)
        check_possible(profile, loaded, strategy, spec.catalog)
        torch.manual_seed(spec.seed)
        batches, calibration = None, None
        if spec.prune.needs_calibration or self.freeze in ("mean-score", "last"):
            batches, calibration = calibration_of(spec.calibration, loaded)
        file = spec.calibration.statistics
        statistics = StatisticsFile(file) if file is not None and spec.prune.needs_calibration else None
        self.manifest = self._origin(loaded, calibration)
        pruned = prune(
            loaded.model,
            strategy,
            calibration=batches if spec.prune.needs_calibration else None,
            catalog=spec.catalog,
            progress=self.progress,
            statistics=statistics,
            runtime=self._runtime,
        )
        if statistics is not None:
            self.manifest["calibration"]["statistics"] = statistics.used
        with pruned, folder.open() as partial:
            self._measure_before(loaded, pruned)
            if self.freeze is not None:
                pruned.freeze(self.freeze, batches, self.progress)
            self._describe(pruned)
            name = folder.target.name
            self._notes += write_model(profile, pruned, loaded.tokenizer, partial, self.shard_size, name)
            if profile.needs_one_cut:
                write_kept(partial, pruned.sites_kept)
            (partial / RECIPE).write_text(pinned(spec, loaded).to_yaml(), encoding="utf-8")
            copy_licence_files(spec.model, partial)
            self._load_again(loaded, pruned, partial, some_tokens(loaded, batches))
            self._take_over_run()
            self.manifest["notes"] = list(dict.fromkeys(self._notes))
            (partial / CARD).write_text(card(self.manifest, name), encoding="utf-8")
            finish(partial, self.manifest)
        return self.manifest

    @property
    def _runtime(self) -> Runtime:
        """The pipeline's, but nothing is compiled for a few batches."""
        return self.spec.runtime.model_copy(update={"compile": None})

    def _check_run(self, loaded: Loaded) -> None:
        known = self.run.model.fingerprint if self.run else None
        if known is not None and known != fingerprint(loaded.model):
            raise ModelError(
                f"the run was of other weights of {self.spec.model.label} than are there now (fingerprint "
                f"{known[:12]}...); export the pipeline file itself, or name the model that was run"
            )

    def _origin(self, loaded: Loaded, calibration: CalibrationFacts | None) -> dict[str, Any]:
        """What a manifest says of where the model comes from."""
        spec, profile = self.spec, self._profile
        meaning = MEANINGS.get(self.freeze, "") if spec.prune.dynamic else "units chosen once, and the calibrated mean"
        frozen = None if self.freeze is None else {"how": self.freeze, "meaning": meaning}
        return {
            "profile": profile.name,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "strategy": spec.prune.name,
            "options": {"multiple": self.multiple, "freeze": self.freeze, "shard_size": self.shard_size},
            "freeze": frozen,
            "recovery": None,
            "requires": needs() if profile.name == "hf-hetero" else {},
            "base": about_model(loaded).as_json(),
            "license": licence_of(spec.model),
            "calibration": calibration and calibration.as_json(),
            "seeds": {"pipeline": spec.seed, "calibration": spec.calibration.seed, "strategy": spec.prune.seed},
            "versions": versions(),
            "plugins": plugins_used(spec),
            "plugin_files": [path.name for path in spec.plugins],
        }

    def _measure_before(self, loaded: Loaded, pruned: Pruned) -> None:
        """Measure the dense model and, where decisions are going to be frozen, the one that takes them."""
        evaluators = self.spec.evaluate
        measuring = Measuring(loaded, pruned, self.progress, {}, evaluators, self.spec.seed)
        self._measured: list[tuple[str, Any]] = []
        self.manifest["metrics"] = metrics = []
        for label, evaluator in labelled(evaluators):
            if evaluator not in repeatable(evaluators):
                continue
            dense = measuring.measure(evaluator, dense=True).values
            per_batch = None if self.freeze is None else measuring.measure(evaluator).values
            self._measured.append((label, evaluator))
            metrics.append({"label": label, "dense": dense, "per_batch": per_batch})

    def _describe(self, pruned: Pruned) -> None:
        """What a manifest says of the cut."""
        active = pruned.active_parameters()
        parameters = {"dense": self.manifest["base"]["parameters"], "active": active, "exported": active}
        cut = about_cut(pruned)
        self.manifest |= {**cut.as_json(), "rounding": rounding(pruned), "parameters": parameters}
        self._notes += notes_on_cut(pruned, cut)

    def _load_again(self, loaded: Loaded, pruned: Pruned, partial: Path, ids: Tensor) -> None:
        """Compare the folder, loaded as it will be, with the pruned model, and measure it; one model is held at a time.

        A GGUF is not loaded here: transformers measures the weights that were written to it.
        """
        self.manifest |= {"weights": None, "check": None}
        if self._profile.name == "gguf":
            self._notes.append(
                "measured in transformers before the weights went to the GGUF; prunekit verify measures the file "
                "itself where llama-cpp-python is installed"
            )
            return self._measure_after(loaded, pruned)
        expected, dtype = logits_of(loaded.model, ids, pruned), loaded.model.dtype
        pruned.remove()
        if self._profile.name == "dynamic":
            again = reload.restored(partial, self.spec.model_copy(update={"runtime": self._runtime}), loaded)
        else:
            pruned.forget()
            loaded.model = None
            source = self.spec.model.model_copy(update=reload.of_folder(partial))
            again = reload.Export(*reload.model_in(source), None, self.manifest, partial)
            check_tokenizer(loaded.tokenizer, again.tokenizer)
        try:
            found, alike = logits_of(again.model, ids, again.pruned), self.profile in ("hf-hetero", "dynamic")
            self.manifest |= {"weights": fingerprint(again.model), "check": compared(expected, found, dtype, alike)}
            self.manifest["parameters"]["exported"] = sum(p.numel() for p in again.model.parameters())
            self._measure_after(again.loaded, again.pruned)
        finally:
            if again.pruned is not None:
                again.pruned.remove()

    def _measure_after(self, loaded: Loaded, pruned: Pruned | None) -> None:
        for (label, evaluator), metric in zip(self._measured, self.manifest["metrics"], strict=True):
            measured = measure(evaluator, loaded, self.spec.seed, self.profile, pruned, self.progress)
            metric |= {**entry(evaluator, measured), "exported": measured.values}
            self._notes += [f"{label}: {note}" for note in measured.notes]

    def _take_over_run(self) -> None:
        """Keep the run's own measurements, where the export has the same cut; else say that it has not."""
        self.manifest["run"] = None
        if self.run is None:
            return
        run = self.run.as_json()
        texts = [(about or {}).get("fingerprint") for about in (run.get("calibration"), self.manifest["calibration"])]
        if self.freeze is not None or run["layers"] != self.manifest["layers"] or texts[0] != texts[1]:
            self._notes.append("the run's other measurements are of another cut: frozen, rounded, or of another text")
            return
        self.manifest["run"] = {"started": run["started"], "metrics": run["metrics"]}
