"""Reads the arguments of ``prunekit recover`` and prints its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...registry import SpecError, TextSource
from ..bundled import TEXTS
from ..export.card import metric_heads, metric_rows
from ..export.command import show_end, size
from ..models.exported.manifest import Manifest
from ..output import printing
from .lora import Lora
from .recovering import Recovery

DEFAULT_TEXT = "reference-calibration"


def recover(folder: Path, out: Path | None, text: dict[str, Any], lora: dict[str, Any], **options: Any) -> None:
    """Recover, and print the result."""
    if out is None:
        raise SpecError("--out DIR is missing: prunekit recover DIR --out DIR2 writes the recovered model to DIR2")
    with printing.Bars() as bars:
        recovery = Recovery(
            folder, out, text_source(**text), Lora(**lora), progress=bars.track, say=bars.say, **options
        )
        manifest = recovery.recover()
    show(manifest)
    printing.say(f"written: {Path(out).expanduser()} ({size(manifest)})", whole=True)


def text_source(
    text: str | None = None,
    dataset: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    field: str | None = None,
    limit: int | None = None,
) -> TextSource:
    """The file, bundled text or hub dataset that the options name; raises :class:`SpecError` for a contradiction."""
    if text is not None and dataset is not None:
        raise SpecError(f"--text {text} and --dataset {dataset}: name one of them")
    for option, value in (("--subset", subset), ("--split", split)):
        if value is not None and dataset is None:
            raise SpecError(f"{option} {value} needs a hub dataset, and none is named; add --dataset, or leave it out")
    more: dict[str, Any] = {key: value for key, value in (("field", field), ("limit", limit)) if value is not None}
    if dataset is not None:
        return TextSource(dataset=dataset, subset=subset, split=split or "train", **more)
    if text is None or (text in TEXTS and not Path(text).is_file()):
        return TextSource(bundled=text or DEFAULT_TEXT, **more)
    return TextSource(file=Path(text), **more)


def show(manifest: Manifest) -> None:
    """Print the training, the measurements and the notes of a recovery."""
    done = manifest.recovery
    assert done is not None  # Recovery has just written it
    each = "each once" if done.epochs == 1 else f"each {done.epochs:.3g} times"
    printing.say(
        f"LoRA of rank {done.rank} on {', '.join(done.layers)} ({done.trainable_parameters:,} parameters), "
        f"{done.steps} steps on {done.sequences} sequences of {done.text}, {each}, {done.seconds:.0f} s"
    )
    printing.say(f"training loss: {done.loss.first:.4g} in the first steps, {done.loss.last:.4g} in the last")
    printing.show_table(metric_heads(manifest), metric_rows(manifest))
    show_end(manifest)
