"""``prunekit recover``: an exported folder, trained and written anew; it appears when it was loaded and measured."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from ...registry import DataError, Evaluator, SpecError, TextSource
from ...registry.tensors.tokens import context_length
from ...registry.tensors.windows import digest
from ..calibration.passes import Progress, no_progress
from ..export import reload
from ..export.card import card
from ..export.comparing import compared, logits_of
from ..export.cut_model import dense_tensors
from ..export.measures import entry, measure, recorded
from ..export.profiles import profile_named
from ..export.weights_file import INDEX, write_weights
from ..models.exported.manifest import CARD, MANIFEST, finish, read_manifest
from ..models.loading import Loaded, ModelSource, fingerprint
from ..output.folders import RunFolder
from ..runs.provenance import versions
from ..runs.text import read_documents
from .lora import Lora, check_installed, train
from .sequences import training_sequences

WEIGHTS = ".safetensors"

REASONS = {
    "padded": "its dropped units are zeros that training would fill in",
    "dynamic": "it has no weights of its own, and decides per batch what it cuts",
    "gguf": "llama.cpp's format cannot be trained",
}
"""Why a profile cannot be recovered."""


@dataclass
class Recovery:
    """One recovery: the export in ``folder``, trained on ``text`` as ``lora`` says, into the folder ``out``.

    ``sequences`` of ``length`` tokens are drawn from the text; None takes as many as there are and the steps can use.
    ``plugins`` are files with evaluators that the export was measured by.
    """

    folder: Path
    out: Path
    text: TextSource
    lora: Lora = field(default_factory=Lora)
    length: int = 256
    sequences: int | None = None
    device: str = "auto"
    overwrite: bool = False
    plugins: Sequence[Path] = ()
    progress: Progress = no_progress

    def recover(self) -> dict[str, Any]:
        """Do it, and return the new manifest.

        Raises :class:`SpecError` for a profile that cannot be trained, a folder that exists, or peft not installed;
        :class:`DataError` for damaged files or a text that is too short; :class:`NonFiniteError` where training
        diverges; :class:`ModelError`. Whatever fails, no folder is left.
        """
        self.folder = Path(self.folder).expanduser()
        target = RunFolder(Path(self.out), self.overwrite, "recovered folder", MANIFEST)
        target.check()
        manifest = read_manifest(self.folder)
        self._check(manifest, target)
        evaluators = [recorded(metric, self.plugins) for metric in manifest["metrics"]]
        found = reload.load(self.folder, device=self.device)
        for evaluator in evaluators:
            evaluator.check(found.model)
        sequences, about_text = self._read_text(found)
        with target.open() as partial:
            model, done = train(found.model, sequences, self.lora, self.progress)
            found.model = None
            manifest["recovery"] = {**done, **about_text, "weights_before": manifest["weights"]}
            ids = sequences[0][None, :64]
            expected, dtype = logits_of(model, ids, None), model.dtype
            self._write(model, manifest, partial)
            del model  # one model is held at a time
            again = Loaded(*reload.model_in(ModelSource(device=self.device, **reload.of_folder(partial))), {})
            manifest |= {
                "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "versions": versions(),
                "weights": fingerprint(again.model),
                "check": compared(expected, logits_of(again.model, ids, None), dtype, alike=True),
            }
            self._measure(evaluators, again, manifest)
            (partial / CARD).write_text(card(manifest, target.target.name), encoding="utf-8")
            finish(partial, manifest)
        return manifest

    def _check(self, manifest: dict[str, Any], target: RunFolder) -> None:
        """Raise what is wrong with the folder and the options before anything is loaded."""
        name = manifest["profile"]
        if name in REASONS:
            raise SpecError(
                f"{self.folder} is of profile {profile_named(name).name}, which cannot be recovered: {REASONS[name]}; "
                "nearest: export again with --profile hf-hetero or hf-uniform"
            )
        if manifest.get("recovery"):
            raise SpecError(
                f"{self.folder} has been recovered already; recover the folder that it came from, with more --steps"
            )
        if target.target == self.folder.resolve():
            raise SpecError(f"--out names the export itself ({self.folder}), which is kept; choose another folder")
        check_installed()

    def _read_text(self, found: reload.Export) -> tuple[list[Tensor], dict[str, Any]]:
        """The sequences to train on, and what the manifest says of them."""
        context = context_length(found.model)
        if context is not None and self.length > context:
            raise DataError(
                f"--length: the model's context is {context} tokens, found {self.length}; take {context} or less"
            )
        documents, label = read_documents(self.text), self.text.label
        sequences = training_sequences(
            documents, found.tokenizer, self.length, self.sequences, self.lora.taken, self.lora.seed, label
        )
        about = {"text": label, "sequences": len(sequences), "length": self.length, "fingerprint": digest(sequences)}
        return sequences, about

    def _write(self, model: Any, manifest: dict[str, Any], partial: Path) -> None:
        """The new weights under the names that the old ones have, and every other file as it was."""
        for name in manifest["files"]:
            if not name.endswith(WEIGHTS) and name not in (CARD, INDEX):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, partial / name)
        write_weights(partial, dense_tensors(model), manifest["options"]["shard_size"])

    def _measure(self, evaluators: Sequence[Evaluator], again: Loaded, manifest: dict[str, Any]) -> None:
        """Measure what the export was measured by; what it measured is kept as ``before_recovery``."""
        notes = list(manifest["notes"])
        for evaluator, metric in zip(evaluators, manifest["metrics"], strict=True):
            measured = measure(evaluator, again, manifest["seeds"]["pipeline"], "recovered", progress=self.progress)
            before = metric["exported"]
            metric |= {**entry(evaluator, measured), "before_recovery": before, "exported": measured.values}
            notes += [f"{metric['label']}: {note}" for note in measured.notes]
        manifest["notes"] = list(dict.fromkeys(notes))
