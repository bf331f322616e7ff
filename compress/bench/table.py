"""Benchmark results as tables for a terminal, as a markdown page, and as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ...registry import STAGES
from ..output import printing
from ..output.formatting import table
from .arms import COMPILED, TITLES
from .measure import DECIDING, Measured

ARMS_HEAD = ("arm", "seconds", "/ dense", "/ ideal", "operations / dense", "peak memory")
COMPILED_HEAD = ("compiled", "/ not compiled", "/ compiled dense", "/ compiled ideal")
STEPS_HEAD = ("step of PP", "milliseconds", "of PP", "of dense")
SUMMARY_HEAD = ("setting", "PP / ideal", "PP / dense", "operations / dense", "decision overhead")

NOTE = (
    "Ratios are medians of paired rounds with their 95% interval. There is no ratio if the interval contains 1 (the "
    "noise is larger than the effect), and none for fewer than six rounds. Decision overhead: select, probe, score and "
    "history, relative to dense."
)

Table = tuple[Sequence[str], list[list[str]]]


def arms_rows(found: Measured, short: bool = False) -> list[list[str]]:
    """A row for each arm; ``short``: ratios without their intervals."""
    same = found.protocol.get("same_as_pp", ())
    return [
        [
            TITLES[name] + (", same as PP here" if name in same else ""),
            f"{median(seconds):.4g}",
            ratio_text(found, name, "dense", short),
            ratio_text(found, name, "ideal", short),
            _operations(found, name),
            f"{found.peak[name] / 2**20:,.0f} MiB",
        ]
        for name, seconds in found.seconds.items()
    ]


def compiled_rows(found: Measured, short: bool = False) -> list[list[str]]:
    """A row for each compiled arm, compared with dense and ideal compiled in the same way."""
    rows = []
    for name, plain in COMPILED.items():
        if name in found.seconds:
            like = [name.replace(plain, other, 1) for other in ("dense", "ideal")]
            rows.append([TITLES[name], *(ratio_text(found, name, base, short) for base in (plain, *like))])
    return rows


def steps_rows(found: Measured, arm: str = "pp") -> list[list[str]]:
    """A row for each step of an arm's passes, the rest of the pass, and the decision overhead."""
    if arm not in found.steps:
        return []
    steps = found.steps[arm]
    parts = {step: steps[step] for step in STAGES if steps[step]}
    parts["the block itself"] = steps["pass"] - sum(parts.values())
    parts["decision overhead"] = sum(steps[step] for step in DECIDING)
    return [
        [name, f"{1000 * seconds:.3g}", f"{seconds / steps['pass']:.1%}", f"{seconds / found.dense_seconds:.1%}"]
        for name, seconds in parts.items()
    ]


def summary_rows(measured: Sequence[Measured], short: bool = False) -> list[list[str]]:
    """A row for each setting, and a row for each compile mode that was measured in it."""
    rows = []
    for found in measured:
        overhead = found.overhead()
        ratios = [ratio_text(found, "pp", base, short) for base in ("ideal", "dense")]
        share = "" if overhead is None else f"{overhead:.1%}"
        rows.append([found.setting.words, *ratios, _operations(found, "pp"), share])
        for title, _, to_dense, to_ideal in compiled_rows(found, short):
            if title.startswith("PP, "):
                rows.append([f"{found.setting.words}, all {title.removeprefix('PP, ')}", to_ideal, to_dense, "", ""])
    return rows


def ratio_text(found: Measured, arm: str, base: str, short: bool = False) -> str:
    """Such as ``0.641 (0.636 to 0.648)``; empty for an arm to itself, and for what was not measured."""
    ratio = None if arm == base else found.ratio(arm, base)
    if ratio is None:
        return ""
    return ratio.short if short else str(ratio)


def data(found: Measured) -> dict[str, Any]:
    """One setting for JSON: every time that was measured, and the significant ratios."""
    bases = [arm for arm in ("dense", "ideal", *COMPILED) if arm in found.seconds]
    arms: dict[str, dict[str, Any]] = {}
    for name, seconds in found.seconds.items():
        ratios = {base: found.ratio(name, base) for base in bases if base != name}
        arms[name] = {
            "title": TITLES[name],
            "seconds": seconds,
            "median_seconds": median(seconds),
            "operations": found.flops.get(name),
            "peak_bytes": found.peak[name],
            "steps": found.steps.get(name),
            **{f"to_{base}": ratio.data() for base, ratio in ratios.items() if ratio},
        }
    return {
        "protocol": found.protocol,
        "arms": arms,
        "decision_overhead": found.overhead(),
        "dense_seconds_beside_steps": found.dense_seconds,
    }


def markdown(measured: Sequence[Measured], command: str) -> str:
    """A page with all tables and protocols."""
    lines = ["# Benchmark", "", f"`{command}`", "", NOTE, ""]
    if len(measured) > 1:
        lines += [*table(SUMMARY_HEAD, summary_rows(measured)), ""]
    for found in measured:
        lines += [f"## {found.setting.words}", ""]
        for head, rows in _tables(found):
            lines += [*table(head, rows), ""]
        lines += ["Protocol:", "", *(f"- {key}: {_text(value)}" for key, value in found.protocol.items()), ""]
    return "\n".join(lines)


def show(found: Measured) -> None:
    """Print one setting's tables."""
    about = found.protocol
    kept = f"; kept {_text(about['kept'])} in all cut layers" if about["kept"] else ""
    layers, threads, rounds = (_count(about[f"{what}s"], what) for what in ("layer", "thread", "round"))
    machine = about.get("accelerator") or f"{threads} of {about['processor']}"
    printing.say(
        f"{found.setting.words}: {layers} of {about['shape']}{kept}; {machine}, torch {about['torch']}, {rounds}"
    )
    for head, rows in _tables(found, printing.narrow()):
        _show(head, rows)


def show_summary(measured: Sequence[Measured]) -> None:
    """Print the summary of several settings, and what all tables mean."""
    if len(measured) > 1:
        _show(SUMMARY_HEAD, summary_rows(measured, printing.narrow()))
    printing.say(NOTE + (" A wider terminal, or --out, shows the intervals." if printing.narrow() else ""))


def _tables(found: Measured, short: bool = False) -> list[Table]:
    tables: list[Table] = [
        (ARMS_HEAD, arms_rows(found, short)),
        (COMPILED_HEAD, compiled_rows(found, short)),
        (STEPS_HEAD, steps_rows(found)),
    ]
    return [(head, rows) for head, rows in tables if rows]


def _show(head: Sequence[str], rows: list[list[str]]) -> None:
    printing.show_wide_table(head, rows, 1, "--out DIR writes them all")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _operations(found: Measured, arm: str) -> str:
    if arm not in found.flops or "dense" not in found.flops:
        return ""
    return f"{found.flops[arm] / found.flops['dense']:.3f}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
