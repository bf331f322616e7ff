"""A run's results as tables for people: the rows once, for the terminal and for report.md alike."""

from __future__ import annotations

from typing import Any

from ..output.formatting import _fact, extent, number, sentence, share, table

HEAD = ("measurement", "dense", "pruned", "change")


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
