"""``prunekit recover``: trains an exported model, writes it to a new folder, loads it again and measures it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...registry import DataError, Evaluator, SpecError, TextSource
from ...registry.tensors.tokens import context_length
from ...registry.tensors.windows import cut_windows, digest, token_stream, with_bos
from ..calibration.passes import Progress, no_progress
from ..export import reload
from ..export.card import card
from ..export.comparing import compared, logits_of
from ..export.measures import measure, record, recorded
from ..export.profiles import profile_named
from ..export.weights import INDEX, dense_tensors, published, write_weights
from ..models.exported.manifest import CARD, MANIFEST, ExportMetric, Manifest, Training, read_manifest, write_manifest
from ..models.loading import Loaded, ModelSource, fingerprint
from ..models.loading import load as load_model
from ..output.folders import RunFolder, plain
from ..runs.documents import read_documents
from ..runs.measuring import Unpruned
from ..runs.plan import Say, planned, silent
from ..runs.provenance import versions
from .lora import Lora, check_installed, train

WEIGHTS = ".safetensors"

REASONS = {
    "padded": "its dropped units are zeros that training would fill in",
    "dynamic": "it has no weights of its own, and decides per batch what it cuts",
    "gguf": "llama.cpp's format cannot be trained",
}
"""Why a profile cannot be recovered."""


@dataclass
class Recovery:
    """One recovery: the export in ``folder`` is trained on ``text`` and written to the folder ``out``.

    ``sequences`` of ``length`` tokens are drawn from the text; None takes as many as the steps can use.
    ``plugins``: files with the evaluators that measured the export.
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
        sequences, facts = self._read_text(found)
        if self.say is not silent:
            lora, named = self.lora, zip((metric.label for metric in before.metrics), evaluators, strict=True)
            self.say(f"to do: training: {lora.steps} steps of {lora.batch_size * lora.accumulate} sequences")
            for line in planned(None, named, Unpruned(found.loaded), "the recovered model"):
                self.say(line)
        with target.open() as partial:
            model, done = train(found.model, sequences, self.lora, self.progress)
            found.model = None
            ids = sequences[0][None, :64]
            expected, dtype = logits_of(model, ids, None), model.dtype
            self._write(model, before, partial)
            del model  # one model is in memory at a time
            again = load_model(reload.source_of(partial, ModelSource(device=self.device)), check=False)
            check = compared(expected, logits_of(again.model, ids, None), dtype, alike=True)
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

    def _read_text(self, found: reload.Export) -> tuple[list[Tensor], dict[str, Any]]:
        """The sequences (t,) int64 to train on, and their description."""
        context = context_length(found.model)
        if context is not None and self.length > context:
            raise DataError(
                f"--length: the model's context is {context} tokens, found {self.length}; take {context} or less"
            )
        documents, label = read_documents(self.text, found.tokenizer), self.text.label
        sequences = training_sequences(
            documents, found.tokenizer, self.length, self.sequences, self.lora.taken, self.lora.seed, label
        )
        facts = {"text": label, "sequences": len(sequences), "length": self.length, "fingerprint": digest(sequences)}
        return sequences, facts

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


def training_sequences(
    documents: Sequence[str], tokenizer: Any, length: int, wanted: int | None, most: int, seed: int, label: str
) -> list[Tensor]:
    """Token ids (length,) int64: ``wanted`` sequences, or all up to ``most``.

    They are drawn without replacement and start in the same way as calibration's. Raises :class:`DataError` for a text
    with too few tokens.
    """
    stream = with_bos(token_stream(documents, tokenizer), tokenizer)
    pieces = [window.ids for window in cut_windows(stream, length, tail="drop")]
    if not pieces:
        raise DataError(
            f"{label} has {len(stream)} tokens, less than one sequence of {length}; shorten --length, or name a longer "
            "text"
        )
    if wanted is not None and len(pieces) < wanted:
        raise DataError(
            f"{label} gives {len(pieces)} sequences of {length} tokens ({len(stream)} tokens in all), --sequences asks "
            f"for {wanted}; lower it to {len(pieces)} or less, shorten --length, or name a longer text"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[index] for index in order[: most if wanted is None else wanted].tolist()]
