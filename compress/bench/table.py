"""What a benchmark says: tables for a terminal and a page, and data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from ...registry import STAGES
from ..output import printing
from .arms import COMPILED, TITLES
from .intervals import Ratio
from .measure import DECIDING, Measured

ARMS_HEAD = ("arm", "seconds", "/ dense", "/ ideal", "operations / dense", "peak memory")
COMPILED_HEAD = ("compiled", "/ not compiled", "/ dense alike", "/ ideal alike")
STEPS_HEAD = ("step of PP", "milliseconds", "of PP", "of dense")
SUMMARY_HEAD = ("where", "PP / ideal", "PP / dense", "operations / dense", "decision overhead")

ELSEWHERE = "--out DIR writes them all"

NOTE = (
    "Ratios are medians of paired rounds with their 95% interval; where the interval holds 1 the noise is larger than "
    "the effect, and there is no ratio; nor is there one of fewer than six rounds. Decision overhead: select, probe, "
    "score and history, relative to dense."
)


def arms_rows(found: Measured, short: bool = False) -> list[list[str]]:
    """A row for each arm; ``short``: ratios without their intervals."""
    rows = []
    for name, seconds in found.seconds.items():
        rows.append(
            [
                TITLES[name] + (", here as PP" if name in found.protocol.get("same_as_pp", ()) else ""),
                f"{median(seconds):.4g}",
                ratio_text(found, name, "dense", short),
                ratio_text(found, name, "ideal", short),
                _operations(found, name),
                f"{found.peak[name] / 2**20:,.0f} MiB",
            ]
        )
    return rows


def compiled_rows(found: Measured, short: bool = False) -> list[list[str]]:
    """A row for each compiled arm, beside the dense model and ideal compiled in the same way."""
    rows = []
    for name, plain in COMPILED.items():
        if name in found.seconds:
            like = [name.replace(plain, other, 1) for other in ("dense", "ideal")]
            rows.append([TITLES[name], *(ratio_text(found, name, to, short) for to in (plain, *like))])
    return rows


def steps_rows(found: Measured, arm: str = "pp") -> list[list[str]]:
    """A row for each step of an arm's passes; the rest is the model's own work."""
    steps = found.steps.get(arm)
    if steps is None:
        return []
    whole = steps["pass"]
    parts = {step: steps[step] for step in STAGES if steps[step]}
    parts["the block itself"] = whole - sum(parts.values())
    rows = [_step(name, seconds, whole, found.dense_seconds) for name, seconds in parts.items()]
    deciding = sum(steps[step] for step in DECIDING)
    return [*rows, _step("decision overhead", deciding, whole, found.dense_seconds)]


def summary_rows(measured: Sequence[Measured], short: bool = False) -> list[list[str]]:
    """A row for each setting, and one for each way to compile, beside its like."""
    rows = []
    for found in measured:
        overhead = found.overhead()
        rows.append(
            [
                found.setting.words,
                ratio_text(found, "pp", "ideal", short),
                ratio_text(found, "pp", "dense", short),
                _operations(found, "pp"),
                "" if overhead is None else f"{overhead:.1%}",
            ]
        )
        for title, _, to_dense, to_ideal in compiled_rows(found, short):
            if title.startswith("PP, "):
                rows.append([f"{found.setting.words}, all {title.removeprefix('PP, ')}", to_ideal, to_dense, "", ""])
    return rows


def ratio_text(found: Measured, arm: str, to: str, short: bool = False) -> str:
    """Such as ``0.641 (0.636 to 0.648)``; empty for an arm to itself, and for what was not measured."""
    ratio: Ratio | None = None if arm == to else found.ratio(arm, to)
    if ratio is None:
        return ""
    return ratio.short if short else str(ratio)


def heading(found: Measured) -> str:
    """One line on what was measured."""
    about = found.protocol
    kept = ", ".join(f"{kind} {count}" for kind, count in found.kept.items())
    kept = f"; kept {kept}" if kept else ""
    layers, threads, rounds = (_count(about[what + "s"], what) for what in ("layer", "thread", "round"))
    machine = about.get("accelerator") or f"{threads} of {about['processor']}"
    return f"{found.setting.words}: {layers} of {about['shape']}{kept}; {machine}, torch {about['torch']}, {rounds}"


def data(found: Measured) -> dict[str, Any]:
    """One setting for JSON: everything measured, and ratios where there are any."""
    to = [arm for arm in ("dense", "ideal", *COMPILED) if arm in found.seconds]
    return {
        "protocol": found.protocol,
        "arms": {
            name: {
                "title": TITLES[name],
                "seconds": seconds,
                "median_seconds": median(seconds),
                "operations": found.flops.get(name),
                "peak_bytes": found.peak[name],
                "steps": found.steps.get(name),
                **{f"to_{other}": found.ratio(name, other).data() for other in to if other != name},
            }
            for name, seconds in found.seconds.items()
        },
        "decision_overhead": found.overhead(),
        "dense_seconds_beside_steps": found.dense_seconds,
    }


def markdown(measured: Sequence[Measured], command: str) -> str:
    """A page with everything on it."""
    lines = ["# Benchmark", "", f"`{command}`", "", NOTE, ""]
    if len(measured) > 1:
        lines += [*_markdown_table(SUMMARY_HEAD, summary_rows(measured)), ""]
    for found in measured:
        lines += [f"## {found.setting.words}", "", *_markdown_table(ARMS_HEAD, arms_rows(found)), ""]
        if compiled_rows(found):
            lines += [*_markdown_table(COMPILED_HEAD, compiled_rows(found)), ""]
        if steps_rows(found):
            lines += [*_markdown_table(STEPS_HEAD, steps_rows(found)), ""]
        lines += ["Protocol:", "", *(f"- {key}: {_said(value)}" for key, value in found.protocol.items()), ""]
    return "\n".join(lines)


def show(found: Measured) -> None:
    """One setting on a terminal."""
    printing.say(heading(found))
    short = printing.narrow()
    printing.show_wide_table(ARMS_HEAD, arms_rows(found, short), 1, ELSEWHERE)
    if compiled_rows(found):
        printing.show_wide_table(COMPILED_HEAD, compiled_rows(found, short), 1, ELSEWHERE)
    if steps_rows(found):
        printing.show_wide_table(STEPS_HEAD, steps_rows(found), 1, ELSEWHERE)


def show_summary(measured: Sequence[Measured]) -> None:
    """All settings on a terminal, a row for each."""
    printing.show_wide_table(SUMMARY_HEAD, summary_rows(measured, printing.narrow()), 1, ELSEWHERE)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def _step(name: str, seconds: float, whole: float, dense: float) -> list[str]:
    return [name, f"{1000 * seconds:.3g}", f"{seconds / whole:.1%}", f"{seconds / dense:.1%}"]


def _operations(found: Measured, arm: str) -> str:
    if arm not in found.flops or "dense" not in found.flops:
        return ""
    return f"{found.flops[arm] / found.flops['dense']:.3f}"


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(part)}" for key, part in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(head) + " |"
    return [line, "|---" + "|---:" * (len(head) - 1) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
