"""The checks of export formats, on a small random model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..roles.exporting import MADE_FROM, ExportFormat
from ..tensors.model_state import ModelState
from .parts import expect
from .toy import toy_model, toy_tokenizer


def check_source(written: ExportFormat) -> None:
    """It is made from a profile whose model is loaded again, with widths that are multiples of a whole number."""
    profiles = f"{', '.join(MADE_FROM[:-1])} or {MADE_FROM[-1]}"
    expect(written.made_from in MADE_FROM, written, f"made_from must be {profiles}, found {written.made_from!r}")
    whole = isinstance(written.multiple, int) and written.multiple >= 1
    expect(whole, written, f"multiple must be a whole number from 1, found {written.multiple!r}")


def check_export(written: ExportFormat) -> None:
    """It writes files into its folder alone, the same every time, and leaves the model as it was."""
    model, tokenizer = toy_model(), toy_tokenizer()
    written.check(model.config)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before, files = ModelState(model), []
    try:
        for _ in range(2):
            with TemporaryDirectory() as place:
                folder = Path(place) / "out" / written.name
                folder.mkdir(parents=True)
                notes = written.write(model, tokenizer, folder)
                listed = isinstance(notes, (list, tuple)) and all(isinstance(note, str) for note in notes)
                expect(listed, written, f"must return a list of notes from write, found {notes!r}")
                found = {path: path.read_bytes() for path in sorted(Path(place).rglob("*")) if path.is_file()}
                outside = [path.name for path in found if folder not in path.parents]
                expect(not outside, written, f"writes {', '.join(outside[:1])} outside of the folder that it is given")
                files.append({path.relative_to(folder): content for path, content in found.items()})
        left = before.left()
    finally:
        before.restore()
    expect(bool(files[0]), written, "writes no file")
    expect(files[0] == files[1], written, "writes other files the second time; leave times and random names out")
    now = dict(model.named_parameters())
    changed = [name for name, old in values.items() if name not in now or not torch.equal(old, now[name])]
    left = [f"changes {name}" for name in [*changed, *before.weights()]] + left
    expect(not left, written, f"{left and left[0]}; write must leave the model as it was")


EXPORT_CHECKS: list[Callable] = [check_source, check_export]
