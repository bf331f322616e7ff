"""``prunekit recover``: trains an exported model, writes it to a new folder, loads it again and measures it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...registry import Evaluator, SpecError, TextSource
from ..calibration.passes import Progress, no_progress
from ..export import reload
from ..export.card import card
from ..export.comparing import compared, logits_of
from ..export.measures import measure, record, recorded
from ..export.profiles import profile_named
from ..export.weights import INDEX, dense_tensors, published, write_weights
from ..files.recover import Recover, check_installed
from ..models.exported.manifest import CARD, MANIFEST, ExportMetric, Manifest, read_manifest, write_manifest
from ..models.loading import Loaded, fingerprint
from ..models.loading import load as load_model
from ..models.source import ModelSource
from ..output.folders import RunFolder, plain
from ..output.records import Training
from ..runs.measuring import Unpruned
from ..runs.plan import Say, planned, silent
from ..runs.provenance import versions
from .lora import train
from .text import text_of

WEIGHTS = ".safetensors"

DEFAULT_TEXT = TextSource(bundled="reference-calibration")
"""What a folder is trained on where no text is named."""

RELOADED = "the recovered model, loaded again, gives other logits than the trained one"

REASONS = {
    "padded": "its dropped units are zeros that training would fill in",
    "dynamic": "it has no weights of its own, and decides per batch what it cuts",
    "gguf": "llama.cpp's format cannot be trained",
}
"""Why a profile cannot be recovered."""


@dataclass
class Recovery:
    """One recovery: the export in ``folder`` is trained as ``how`` says and written to the folder ``out``.

    ``plugins``: files with the evaluators that measured the export.
    """

    folder: Path
    out: Path
    how: Recover = field(default_factory=Recover)
    device: str = "auto"
    overwrite: bool = False
    plugins: Sequence[Path] = ()
    progress: Progress = no_progress
    say: Say = silent
    """Gets the lines of the plan."""

    def recover(self) -> Manifest:
        """Write the recovered folder, and return its manifest.

        Raises :class:`SpecError` for a profile that cannot be trained, a folder that exists, or a missing peft;
        :class:`DataError` for damaged files or a text that is too short; :class:`NonFiniteError` if training
        diverges; :class:`ModelError`. After an error there is no folder.
        """
        self.folder = Path(self.folder).expanduser()
        target = RunFolder(Path(self.out), self.overwrite, "recovered folder", MANIFEST)
        target.check()
        before = read_manifest(self.folder)
        self._check(before, target)
        evaluators = [recorded(metric, self.plugins) for metric in before.metrics]
        found = reload.load(self.folder, device=self.device)
        for evaluator in evaluators:
            evaluator.check(found.model)
        sequences, facts = text_of(self.how, [self.how.text or DEFAULT_TEXT], found.loaded)
        if self.say is not silent:
            named = zip((metric.label for metric in before.metrics), evaluators, strict=True)
            for line in planned(None, named, Unpruned(found.loaded), "the recovered model", self.how):
                self.say(line)
        with target.open() as partial:
            model, done = train(found.model, sequences, self.how, self.progress)
            found.model = None
            ids = sequences[0][None, :64]
            expected, dtype = logits_of(model, ids, None), model.dtype
            self._write(model, before, partial)
            del model  # one model is in memory at a time
            again = load_model(reload.source_of(partial, ModelSource(device=self.device)), check=False)
            check = compared(expected, logits_of(again.model, ids, None), dtype, alike=True, what=RELOADED)
            metrics, notes = self._measure(evaluators, again, before)
            changes = {
                "recovery": Training(**done, **facts, weights_before=before.weights),
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "versions": versions(),
                "weights": fingerprint(again.model),
                "check": check,
                "metrics": metrics,
                "notes": notes,
            }
            manifest = before.model_copy(update=changes)
            (partial / CARD).write_text(card(manifest, target.target.name), encoding="utf-8")
            return write_manifest(partial, manifest)

    def _check(self, manifest: Manifest, target: RunFolder) -> None:
        """Raise for an unsuitable folder or option before anything is loaded."""
        name = manifest.profile
        if name in REASONS:
            raise SpecError(
                f"{self.folder} is of profile {profile_named(name).name}, which cannot be recovered: {REASONS[name]}; "
                "nearest: export again with --profile hf-hetero or hf-uniform"
            )
        if manifest.recovery:
            raise SpecError(
                f"{self.folder} has been recovered already; recover the folder that it came from, with more --steps"
            )
        if target.target == self.folder.resolve():
            raise SpecError(f"--out names the export itself ({self.folder}), which is kept; choose another folder")
        check_installed()

    def _write(self, model: Any, manifest: Manifest, partial: Path) -> None:
        """Write the new weights under the names of the old ones, and copy every other file."""
        for name in manifest.files:
            if not name.endswith(WEIGHTS) and name not in (CARD, INDEX):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, partial / name)
        write_weights(partial, dense_tensors(model), manifest.options.shard_size, published(model))

    def _measure(
        self, evaluators: Sequence[Evaluator], again: Loaded, before: Manifest
    ) -> tuple[list[ExportMetric], list[str]]:
        """Run the export's evaluators again; its own values are kept as ``before_recovery``."""
        metrics, notes = [], list(before.notes)
        for evaluator, metric in zip(evaluators, before.metrics, strict=True):
            found = measure(evaluator, again, before.seeds["pipeline"], "recovered", progress=self.progress)
            changes = {"evaluator": record(evaluator), "protocol": found.protocol, "exported": plain(found.values)}
            metrics.append(metric.model_copy(update={**changes, "before_recovery": metric.exported}))
            notes += [f"{metric.label}: {note}" for note in found.notes]
        return metrics, list(dict.fromkeys(notes))
