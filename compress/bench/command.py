"""``prunekit bench``."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...registry import ModelError, SpecError, near
from ..files.yaml_file import apply_settings
from ..models.loading import usable_device
from ..output import printing
from ..output.folders import RunFolder, write_json
from . import table
from .arms import DEFAULT, Setting, check_names
from .malloc import keep_freed_memory
from .measure import Measured, measure
from .presets import PRESETS, Case

RESULT = "bench.json"
FORMAT = 1


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
    """Measure every combination of dtypes, shapes and ratios, print tables, and write them with ``out``.

    Raises :class:`SpecError` naming the option and the value that cannot be.
    """
    kept = not page_faults and keep_freed_memory()
    folder = RunFolder(Path(out), overwrite, what="benchmark", marker=RESULT) if out else None
    if folder:
        folder.check()
    names = list(dict.fromkeys(name.strip() for name in arms.split(",") if name.strip())) if arms else list(DEFAULT)
    check_names(names)
    if "dense" not in names:
        raise SpecError("--arms: the arm dense must be among them: every ratio is to it")
    try:
        kind = usable_device(device).type
    except ModelError as error:
        raise SpecError(str(error).replace("model.device", "--device")) from None
    if kind not in ("cpu", "cuda"):
        raise SpecError(f"--device: memory can be measured on cpu and cuda alone, found {device}")
    wanted = settings_of(preset, dtype, batch, ratio, layers, skip, device, strategy_options(settings, names), seed)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    if cpu_time and (torch.get_num_threads() > 1 or device != "cpu"):
        raise SpecError("--cpu-time counts what the processor did for one thread: give --threads 1, and --device cpu")
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
    if len(measured) > 1:
        table.show_summary(measured)
    printing.say(table.NOTE + (" A wider terminal, or --out, shows the intervals." if printing.narrow() else ""))
    if folder:
        with folder.open() as partial:
            command = shlex.join(["prunekit", *without_place(sys.argv[1:])])
            data = [table.data(found) for found in measured]
            write_json(partial / RESULT, {"format": FORMAT, "command": command, "settings": data})
            (partial / "bench.md").write_text(table.markdown(measured, command), encoding="utf-8", newline="\n")
        printing.say(f"benchmark: {folder.target}", whole=True)


def without_place(arguments: Sequence[str]) -> list[str]:
    """A command's arguments with DIR for the folder of ``--out``: where that is concerns nobody else."""
    said = list(arguments)
    for at, argument in enumerate(arguments):
        if argument.startswith("--out="):
            said[at] = "--out=DIR"
        elif argument == "--out":
            said[at + 1 : at + 2] = ["DIR"]
    return said


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
    """Every combination of what the options list, or what the preset is measured with where they list nothing.

    Raises :class:`SpecError` for what cannot be.
    """
    if preset not in PRESETS:
        raise SpecError(
            f"--preset: there is no preset {preset!r}{near(preset, PRESETS)}; there are {', '.join(PRESETS)}"
        )
    chosen = PRESETS[preset]
    count = layers or chosen.layers
    skipped = chosen.skipped if count >= chosen.layers else ()
    if skip is not None:
        skipped = tuple(_number("--skip-layers", part, int, 0) for part in skip.split(",") if part.strip())
    base = Setting(preset, chosen, count, "", 0, 0, 0.0, skipped, device, options, seed)
    return [
        replace(base, dtype=case.dtype, batch=case.batch, length=case.length, ratio=case.ratio)
        for case in _cases(chosen.cases, dtype, batch, ratio)
    ]


def strategy_options(settings: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Options of the strategy from settings like ``prune.history.pool=16``."""
    data: dict[str, Any] = {}
    apply_settings(data, settings)
    for key in data:
        if key != "prune":
            raise SpecError(f"--set {key}: a benchmark runs PP alone, so that only prune.* can be set")
    options = data.get("prune", {})
    if not isinstance(options, dict):
        raise SpecError(f"--set prune: set one of its keys, such as prune.history.pool=16; found {options!r}")
    for key in ("use", "ratio", "skip_layers"):
        if key in options:
            raise SpecError(
                f"--set prune.{key}: PP is what is measured; --ratio and --skip-layers have options of their own"
            )
    for key in ("scorer", "applier"):
        if key in options and "pp-reference" in names:
            raise SpecError(f"--set prune.{key}: the arm pp-reference has one of its own; leave it out of --arms")
    return options


def _cases(usual: Sequence[Case], dtype: str | None, batch: str | None, ratio: str | None) -> Sequence[Case]:
    if dtype is batch is ratio is None:
        return usual
    first = usual[0]
    dtypes = [part.strip() for part in (dtype or first.dtype).split(",")]
    for name in dtypes:
        if name not in ("float32", "bfloat16", "float16"):
            raise SpecError(f"--dtype: there are float32, bfloat16 and float16, found {name!r}")
    shapes = [_shape(part) for part in batch.split(",")] if batch else [(first.batch, first.length)]
    ratios = [_number("--ratio", part, float, 0) for part in ratio.split(",")] if ratio else [first.ratio]
    for value in ratios:
        if not 0 < value < 1:
            raise SpecError(f"--ratio: a ratio is the share that is cut, between 0 and 1; found {value:g}")
    combined = itertools.product(shapes, dtypes, ratios)
    return [Case(name, rows, length, value) for (rows, length), name, value in combined]


def _shape(text: str) -> tuple[int, int]:
    rows, _, length = text.strip().lower().partition("x")
    try:
        found = int(rows), int(length)
    except ValueError:
        found = (0, 0)
    if min(found) < 1 or found[1] < 2:
        raise SpecError(f"--batch: write sequences x tokens, such as 20x256; found {text!r}")
    return found


def _number(option: str, text: str, kind: type, least: float) -> Any:
    try:
        value = kind(text.strip())
    except ValueError:
        raise SpecError(f"{option}: expected a number, found {text.strip()!r}") from None
    if value < least:
        raise SpecError(f"{option}: {least:g} or more, found {value:g}")
    return value
