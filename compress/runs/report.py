"""A run's results as tables for people: the rows once, for the terminal and for report.md alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..output.formatting import accuracy_of, achieved, extent, fact, kept_units, names_of, sentence, table, value_text
from ..output.records import CompensationFacts, Training, Value
from .records import NOT_PRUNED, RunResult

HEAD = ("measurement", "dense", "pruned", "change")


def metric_rows(result: RunResult) -> list[tuple[str, str, str, str]]:
    """Rows under :data:`HEAD`, one for each value; values that the protocol or the change states are left out."""
    rows = []
    for metric in result.metrics:
        dense = metric.dense or {}
        for name in names_of(metric.pruned):
            value = metric.pruned[name]
            stated = value is not None and metric.protocol.get(name) == value
            if stated or (name not in dense and name.removesuffix("_ratio") in dense):
                continue
            label = name if metric.label == name else f"{metric.label}: {name}"
            before, after = value_text(dense, name), value_text(metric.pruned, name)
            rows.append((label.replace("_", " "), before, after, _change(name, dense, metric.pruned)))
    return rows


def _change(name: str, before: Mapping[str, Value], after: Mapping[str, Value]) -> str:
    dense, value = before.get(name), after.get(name)
    if not isinstance(dense, (int, float)) or not isinstance(value, (int, float)):
        return ""
    if accuracy_of(after, name):
        return f"{100 * (value - dense):+.1f} points"
    if name == "loss":  # a logarithm: its difference means something, its ratio does not
        return f"{value - dense:+.3g}"
    return f"x {value / dense:.3g}" if dense else ""


def headline(result: RunResult) -> str:
    """One line: what was pruned by which strategy, and how much."""
    if result.strategy == NOT_PRUNED:
        return f"{result.model.name}, not pruned"
    recovered = "" if result.recovery is None else f", recovered by {result.recovery.label}"
    return f"{result.strategy} on {result.model.name}: {achieved(result.ratio)}{recovered}"


def markdown(result: RunResult) -> str:
    """report.md."""
    model, calibration = result.model, result.calibration
    lines = [
        f"# {'Not pruned' if result.strategy == NOT_PRUNED else result.strategy}",
        "",
        headline(result) + ".",
        "",
        *table(HEAD, metric_rows(result)),
        "",
        "## How it was measured",
        "",
        *(f"- **{metric.label}**: {sentence(metric.protocol)}" for metric in result.metrics),
        f"- **model**: {model.name}, {model.parameters:,} parameters, {model.form} on {model.device}, "
        f"{model.attention} attention, fingerprint {fact(model.fingerprint)}",
        f"- **calibration**: {sentence(calibration.as_json()) if calibration else 'none needed'}",
        *_compensation(result.compensation),
        *_recovery(result.recovery),
        *_search(result.search),
        *([f"- **runtime**: {sentence(result.runtime)}"] if result.runtime else []),
        f"- **versions**: {sentence(result.versions)}; run {result.started}, {result.seconds.total:.0f} s",
        "",
    ]
    if result.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in result.notes), ""]
    heads = {"kv_group": "key/value groups"}.get(result.attention_unit, "heads")
    lines += ["## Kept units", "", *kept_units(result.layers, f"attention ({heads})", "mlp"), ""]
    lines += ["`resolved.yaml` in the same folder reruns to the same numbers.", ""]
    return "\n".join(lines)


def _compensation(about: CompensationFacts | None) -> list[str]:
    """The line on how the contribution of the dropped channels was compensated, if it was."""
    if about is None:
        return []
    options = dict(about.compensator)
    if options.get("probe") == 0:
        options.pop("selector", None)  # nothing is probed
    if about.ridge:
        options["ridge"] = f"{extent(about.ridge)} times the mean variance"
    fell_back = f"; the mean alone at {', '.join(about.fell_back)}" if about.fell_back else ""
    gathered = "" if about.tokens is None else f"; covariance of {about.tokens:,} tokens"
    return [f"- **compensation**: {options.pop('name')} ({sentence(options) or 'no options'}){gathered}{fell_back}"]


def _recovery(done: Training | None) -> list[str]:
    """The line on the training after the cut, if there was any."""
    if done is None:
        return []
    facts = {key: value for key, value in done.as_json().items() if key not in ("method", "loss")}
    loss = f"training loss {done.loss.first:.4g} in the first steps, {done.loss.last:.4g} in the last"
    return [f"- **recovery**: {done.label}, {done.tokens:,} tokens in {done.seconds:.0f} s; {loss}; {sentence(facts)}"]


def _search(steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The line on the steps of an allocator that searched, by the last of them."""
    if not steps:
        return []
    return [f"- **search**: {len(steps)} step{'s' * (len(steps) > 1)}; the last: {sentence(dict(steps[-1]))}"]
