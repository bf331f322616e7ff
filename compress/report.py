"""A run's results as tables for people: the rows once, for the terminal and for report.md alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

HEAD = ("measurement", "dense", "pruned", "change")

TIE = 0.01
"""Perplexities closer than this share are called equal, where nothing is known of their spread."""


def number(value: Any) -> str:
    """A value as people read it: four significant digits, thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3e}"
    digits = max(0, 3 - len(str(int(abs(value)))) + 1)
    return f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """0.4 -> 40%, 11.4 -> 1,140%."""
    if value is None:
        return "-"
    text = f"{100 * value:.3g}"
    return f"{float(text):,.0f}%" if "e+" in text else f"{text}%"


def metric_rows(data: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows under :data:`HEAD`, one for each value of each evaluator; what its protocol or change says is left out."""
    rows = []
    for outcome in data["metrics"]:
        for name, value in outcome["pruned"].items():
            dense = outcome["dense"] or {}
            stated = value is not None and outcome["protocol"].get(name) == value
            if stated or (name not in dense and name.removesuffix("_ratio") in dense):
                continue
            label = name if outcome["label"] == name else f"{outcome['label']}: {name}"
            before = dense.get(name)
            rows.append((label.replace("_", " "), number(before), number(value), _change(name, before, value)))
    return rows


def _change(name: str, dense: Any, value: Any) -> str:
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (dense, value))
    if numbers and name == "loss":  # a logarithm: its difference means something, its ratio does not
        return f"{value - dense:+.3g}"
    return f"x {value / dense:.3g}" if numbers and dense else ""


def headline(data: dict[str, Any]) -> str:
    """One line: what was pruned by what, asked and achieved."""
    ratio = data["ratio"]
    asked = "" if ratio["asked"] is None else f", {share(ratio['asked'])} asked"
    return (
        f"{data['strategy']} on {data['model']['name']}{asked}: {share(ratio['units_cut'])} of the units and "
        f"{share(ratio['prunable_parameters_cut'])} of the prunable parameters cut"
    )


def markdown(data: dict[str, Any]) -> str:
    """report.md."""
    model, calibration = data["model"], data["calibration"]
    lines = [
        f"# {data['strategy']}",
        "",
        headline(data) + ".",
        "",
        *table(HEAD, metric_rows(data)),
        "",
        "## How it was measured",
        "",
    ]
    for outcome in data["metrics"]:
        lines.append(f"- **{outcome['label']}**: {sentence(outcome['protocol'])}")
    lines += [
        f"- **model**: {model['name']}, {model['parameters']:,} parameters, {model['dtype']} on {model['device']}, "
        f"{model['attention']} attention, fingerprint {_fact(model['fingerprint'])}",
        f"- **calibration**: {sentence(calibration) if calibration else 'none needed'}",
        *_compensation(data.get("compensation")),
        *([f"- **runtime**: {sentence(data['runtime'])}"] if data.get("runtime") else []),
        f"- **versions**: {sentence(data['versions'])}; run {data['started']}, {data['seconds']['total']:.0f} s",
        "",
    ]
    if data["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in data["notes"]), ""]
    unit = {"attention": "attention (" + {"kv_group": "key/value groups"}.get(data["attention_unit"], "heads") + ")"}
    kinds = [kind for kind in data["layers"][0] if kind != "layer"] if data["layers"] else []
    rows = [
        (str(layer["layer"]), *(f"{layer[kind]['kept']} of {layer[kind]['units']}" for kind in kinds))
        for layer in data["layers"]
    ]
    lines += ["## Kept units", "", *table(("layer", *(unit.get(kind, kind) for kind in kinds)), rows), ""]
    lines += ["`resolved.yaml` beside this file reruns to the same numbers.", ""]
    return "\n".join(lines)


def _compensation(about: dict[str, Any] | None) -> list[str]:
    """The line that says how the dropped channels' contribution was given back, where it was."""
    if about is None:
        return []
    options, ridge = dict(about["compensator"]), about["ridge"]
    if options.get("probe") == 0:
        options.pop("selector", None)  # nothing is probed
    if ridge:
        options["ridge"] = f"{extent(ridge)} times the mean variance"
    fell_back = f"; the mean alone at {', '.join(about['fell_back'])}" if about["fell_back"] else ""
    gathered = "" if about["tokens"] is None else f"; covariance of {about['tokens']:,} tokens"
    return [f"- **compensation**: {options.pop('name')} ({sentence(options) or 'no options'}){gathered}{fell_back}"]


def extent(ends: dict[str, float]) -> str:
    """The ``least`` and ``largest`` as one number, or "0.02 to 0.31"."""
    least, largest = (f"{ends[key]:.3g}" for key in ("least", "largest"))
    return least if least == largest else f"{least} to {largest}"


def sentence(facts: dict[str, Any]) -> str:
    """``key value`` pairs in a row."""
    return ", ".join(f"{key.replace('_', ' ')} {_fact(value)}" for key, value in facts.items() if value is not None)


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return f"({sentence(value)})"
    if isinstance(value, str) and value != value.strip():
        return repr(value)
    if isinstance(value, str) and len(value) == 64:
        return f"`{value[:12]}`"  # a sha256: results.json has it whole
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return number(value) if isinstance(value, float) else str(value)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, its columns aligned in the source too."""
    rows = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|").ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return [lines[0], rule, *lines[1:]]
