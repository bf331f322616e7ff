"""Reads the arguments of ``prunekit recover`` and prints its results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...registry import Catalog, SpecError
from ..bundled import TEXTS
from ..export.card import metric_heads, metric_rows
from ..export.command import show_end, size
from ..files.recover import Recover
from ..files.spec import SpecReader
from ..models.exported.manifest import Manifest
from ..output import printing
from .recovering import Recovery


def recover(folder: Path, out: Path | None, text: str | None, how: dict[str, Any], **options: Any) -> None:
    """Recover, and print the result; ``how`` has the options of :class:`Recover` that were given."""
    if out is None:
        raise SpecError("--out DIR is missing: prunekit recover DIR --out DIR2 writes the recovered model to DIR2")
    reader = SpecReader(Catalog(), Path.cwd())
    asked = reader.result(reader.model(Recover, {**how, **named_text(text)}, ()), "recover")
    with printing.Bars() as bars:
        recovery = Recovery(folder, out, asked, progress=bars.track, say=bars.say, **options)
        manifest = recovery.recover()
    show(manifest)
    printing.say(f"written: {Path(out).expanduser()} ({size(manifest)})", whole=True)


def named_text(text: str | None) -> dict[str, Any]:
    """What ``--text`` names, a bundled text or a file, as an option of :class:`Recover`."""
    if text is None:
        return {}
    return {"bundled" if text in TEXTS and not Path(text).is_file() else "file": text}


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
