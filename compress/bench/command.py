"""``prunekit bench``."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...registry import ModelError, SpecError, near
from ..files.yaml_file import apply_settings
from ..models.loading import usable_device
from ..output import printing
from ..output.folders import RunFolder, write_json
from . import table
from .arms import DEFAULT, TITLES, Setting
from .malloc import keep_freed_memory
from .measure import Measured, measure
from .presets import PRESETS, Case

RESULT = "bench.json"
FORMAT = 1

DTYPES = ("float32", "bfloat16", "float16")

Value = TypeVar("Value")


def bench(
    preset: str,
    arms: str | None,
    dtype: str | None,
    batch: str | None,
    ratio: str | None,
    layers: int | None,
    skip: str | None,
    threads: int | None,
    rounds: int,
    warmup: int,
    device: str,
    cpu_time: bool,
    page_faults: bool,
    settings: Sequence[str],
    seed: int,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Measure every combination of dtypes, shapes and ratios, print tables, and write them to ``out``.

    Raises :class:`SpecError` naming the option and the bad value, and :class:`ModelError` if a device's memory is full.
    """
    kept = not page_faults and keep_freed_memory()
    folder = RunFolder(Path(out), overwrite, what="benchmark", marker=RESULT) if out else None
    if folder:
        folder.check()
    asked = _each("--arms", arms, str, "") or DEFAULT
    names = list(dict.fromkeys(_known("--arms", name, TITLES) for name in asked))
    if "dense" not in names:
        raise SpecError("--arms: add the arm dense; all ratios are relative to it")
    try:
        kind = usable_device(device).type
    except ModelError as error:
        raise SpecError(str(error).replace("model.device", "--device")) from None
    if kind not in ("cpu", "cuda"):
        raise SpecError(f"--device: memory can be measured on cpu and cuda only, found {device}")
    wanted = settings_of(preset, dtype, batch, ratio, layers, skip, device, strategy_options(settings, names), seed)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if cpu_time and (torch.get_num_threads() > 1 or device != "cpu"):
        raise SpecError("--cpu-time measures one thread on a processor: add --threads 1 and --device cpu")
    measured: list[Measured] = []
    with printing.Bars() as bars:
        for setting in wanted:
            try:
                found = measure(setting, names, rounds, warmup, cpu_time, bars.track)
            except torch.OutOfMemoryError as error:
                raise ModelError(
                    f"{setting.words}: the device's memory is full ({str(error).splitlines()[0]}); name fewer --arms, "
                    "fewer --layers, or a smaller --batch"
                ) from error
            found.protocol["malloc"] = "freed memory stays with the process" if kept else "the system's default"
            measured.append(found)
            table.show(found)
    table.show_summary(measured)
    if folder:
        with folder.open() as partial:
            command = shlex.join(["prunekit", *without_folder(sys.argv[1:])])
            data = [table.data(found) for found in measured]
            write_json(partial / RESULT, {"format": FORMAT, "command": command, "settings": data})
            (partial / "bench.md").write_text(table.markdown(measured, command), encoding="utf-8", newline="\n")
        printing.say(f"benchmark: {folder.target}", whole=True)


def without_folder(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with DIR instead of the folder of ``--out``."""
    found = list(arguments)
    for at, argument in enumerate(arguments):
        if argument.startswith("--out="):
            found[at] = "--out=DIR"
        elif argument == "--out":
            found[at + 1 : at + 2] = ["DIR"]
    return found


def settings_of(
    preset: str,
    dtype: str | None,
    batch: str | None,
    ratio: str | None,
    layers: int | None,
    skip: str | None,
    device: str,
    options: dict[str, Any],
    seed: int,
) -> list[Setting]:
    """Every combination of the options' values, or the preset's cases if ``dtype``, ``batch`` and ``ratio`` are None.

    Raises :class:`SpecError` for a bad value.
    """
    chosen = PRESETS[_known("--preset", preset, PRESETS)]
    count = layers or chosen.layers
    skipped = chosen.skipped_layers if count >= chosen.layers else ()
    if skip is not None:
        skipped = tuple(_each("--skip-layers", skip, _layer, "numbers of layers, the first is 0"))
    cases: Sequence[Case] = chosen.cases
    if dtype or batch or ratio:
        first = cases[0]
        dtypes = _each("--dtype", dtype, _dtype, f"any of {', '.join(DTYPES)}") or [first.dtype]
        shapes = _each("--batch", batch, _shape, "sequences x tokens, such as 20x256") or [(first.batch, first.length)]
        ratios = _each("--ratio", ratio, _ratio, "shares to cut, between 0 and 1") or [first.ratio]
        cases = [Case(name, *shape, share) for shape, name, share in itertools.product(shapes, dtypes, ratios)]
    base = Setting(preset, chosen, count, "", 0, 0, 0.0, skipped, device, options, seed)
    return [replace(base, dtype=c.dtype, batch=c.batch, length=c.length, ratio=c.ratio) for c in cases]


def strategy_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Options of the strategy from settings like ``prune.history.pool=16``; raises :class:`SpecError` for others."""
    data: dict[str, Any] = {}
    apply_settings(data, settings)
    for key in data:
        if key != "prune":
            raise SpecError(f"--set {key}: a benchmark runs only PP; set prune.* only")
    options = data.get("prune", {})
    if not isinstance(options, dict):
        raise SpecError(f"--set prune: set one of its keys, such as prune.history.pool=16; found {options!r}")
    for key in ("use", "ratio", "skip_layers"):
        if key in options:
            raise SpecError(f"--set prune.{key}: a benchmark runs PP; for the others use --ratio and --skip-layers")
    for key in ("scorer", "applier"):
        if key in options and "pp-reference" in names:
            raise SpecError(f"--set prune.{key}: the arm pp-reference has its own; leave that arm out of --arms")
    return options


def _known(option: str, name: str, names: Collection[str]) -> str:
    if name not in names:
        raise SpecError(f"{option}: unknown name {name!r}{near(name, names)}; choose among {', '.join(names)}")
    return name


def _each(option: str, text: str | None, parse: Callable[[str], Value], expected: str) -> list[Value]:
    """The values of a comma-separated list; raises :class:`SpecError` where ``parse`` raises ValueError."""
    found = []
    for part in filter(None, map(str.strip, (text or "").split(","))):
        try:
            found.append(parse(part))
        except ValueError:
            raise SpecError(f"{option}: expected {expected}; found {part!r}") from None
    return found


def _checked(value: Value, good: bool) -> Value:
    if not good:
        raise ValueError
    return value


def _dtype(text: str) -> str:
    return _checked(text, text in DTYPES)


def _shape(text: str) -> tuple[int, int]:
    rows, length = map(int, text.lower().split("x"))
    return _checked((rows, length), rows >= 1 and length >= 2)


def _ratio(text: str) -> float:
    share = float(text)
    return _checked(share, 0 < share < 1)


def _layer(text: str) -> int:
    return _checked(int(text), int(text) >= 0)
