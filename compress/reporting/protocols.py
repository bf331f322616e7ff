"""How results were measured: protocols, each listed once, and the facts that all trials share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..files.dotted import resolved_settings
from ..output.formatting import named_layers, number
from ..output.pace import duration
from ..runs.records import EvaluatorResult, RunResult
from .axes import finite
from .summary import Configuration, Summary
from .trials import Study, Trial

MOST_VALUES = 4
"""Maximum number of values listed of one key; more are counted."""

BETWEEN = " / "

TEXT_FACTS = ("tokens", "windows", "window", "batch_size")
"""Protocol keys of a text, stated with its name."""


@dataclass(frozen=True)
class Protocol:
    """How one evaluator measured."""

    number: int
    label: str
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


class Protocols:
    """The distinct protocols of a report, numbered in the order in which they appear."""

    def __init__(self) -> None:
        self._known: dict[str, Protocol] = {}

    def of(self, label: str, trials: Sequence[Trial]) -> Protocol | None:
        """The protocol of an evaluator in these trials; None if it did not run."""
        found = [metric for trial in trials if (metric := trial.metric(label))]
        if not found:
            return None
        own = [_own(trial, metric) for trial in trials if (metric := trial.metric(label))]
        facts = tuple(merged(own).items())
        notes = tuple(dict.fromkeys(note for metric in found for note in metric.notes))
        key = json.dumps([label, facts, notes])
        return self._known.setdefault(key, Protocol(len(self._known) + 1, label, facts, notes))

    @property
    def all(self) -> list[Protocol]:
        return list(self._known.values())

    @property
    def by_label(self) -> dict[str, dict[str, str]]:
        """Every evaluator's protocol over all its uses; keys with many values have their number."""
        found: dict[str, dict[str, dict[str, None]]] = {}
        for protocol in self.all:
            for name, value in protocol.facts:
                found.setdefault(protocol.label, {}).setdefault(name, {}).update(dict.fromkeys(value.split(BETWEEN)))
        return {
            label: {
                name: BETWEEN.join(values) if len(values) <= MOST_VALUES else f"{len(values)} different values"
                for name, values in facts.items()
            }
            for label, facts in found.items()
        }


def _own(trial: Trial, metric: EvaluatorResult) -> dict[str, Any]:
    """A protocol in which the protocols of the trial's other evaluators are named, not repeated."""
    facts = metric.protocol.items()
    others = {key: each.label for key, value in facts for each in trial.metrics if value == each.protocol}
    return {key: f"as listed for {others[key]}" if key in others else value for key, value in facts}


def merged(protocols: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The distinct values of each key as text; keys that are null everywhere are left out."""
    found: dict[str, dict[str, None]] = {}
    for protocol in protocols:
        for key, value in protocol.items():
            if value is not None:
                found.setdefault(key.replace("_", " "), {})[fact(value)] = None
    return {key: BETWEEN.join(values) for key, values in found.items()}


def fact(value: Any) -> str:
    """A value of a protocol or setting as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key.replace('_', ' ')} {fact(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, (list, tuple)):
        return " ".join(map(fact, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and finite(value) is not None:
        return f"{value:g}" if abs(value) < 1e6 else number(value)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return value[:12]  # a sha256; the results contain all of it
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)


def summary_facts(study: Study) -> list[tuple[str, str]]:
    """Model, texts, machine, trials and date; values that differ between trials are listed."""
    results = study.results
    texts = [m.protocol for r in results for m in r.metrics if m.evaluator == "perplexity" and m.protocol.get("text")]
    layers = (resolved_settings(trial.resolved).get("prune.skip_layers") for trial in study.done)
    calibrations = [r.calibration for r in results if r.calibration]
    used = merged(result.versions for result in results)
    seconds = sum(trial.seconds or 0 for trial in study.trials)
    days = sorted(result.started[:10] for result in results)
    facts = {
        "Model": _distinct(
            f"{m.name} ({m.architecture}, {number(m.parameters)} parameters, {m.form})"
            for m in (result.model for result in results)
        ),
        "Measured on": _distinct(
            ", ".join([fact(p["text"]), *(f"{name} {fact(p[name])}" for name in TEXT_FACTS if p.get(name))]).replace(
                "_", " "
            )
            for p in texts
        ),
        "Calibrated on": _distinct(
            f"{c.text}, {c.sequences} sequence{'s' * (c.sequences != 1)} of {c.length} tokens" for c in calibrations
        )
        or "nothing",
        "Recovered": _recovered(results),
        "Not pruned": _distinct(_layers(skipped) for skipped in layers if isinstance(skipped, list)),
        "Machine": _distinct(map(_machine, results)),
        "Trials": study.progress + (f", {duration(seconds)}" if seconds else ""),
        "Run": " to ".join(dict.fromkeys((days[0], days[-1]))),
        "Software": ", ".join(f"{n} {used[n]}" for n in ("prunekit", "torch", "transformers") if n in used),
    }
    return [(name, text) for name, text in facts.items() if text]


def _recovered(results: Sequence[RunResult]) -> str:
    """How trials were trained after the cut, with seconds of a training, and how many of them were."""
    done = [result.recovery for result in results if result.recovery is not None]
    if not done:
        return ""
    seconds = sorted(each.seconds for each in done)
    took = f"{seconds[0]:.0f} s" if len(done) == 1 else f"{seconds[0]:.0f} to {seconds[-1]:.0f} s"
    return f"{len(done)} of {len(results)} trials: {_distinct(each.label for each in done)}; {took} of training each"


def _layers(listed: list[Any]) -> str:
    return named_layers(listed) if all(isinstance(layer, int) for layer in listed) else fact(listed)


def versions(study: Study) -> list[tuple[str, str]]:
    """Versions, fingerprints and plugins: they show whether another run used the same software, weights and texts."""
    results = study.results
    facts = {
        **(merged(result.versions for result in results) or merged([study.versions])),
        "weights, sha256": _distinct(result.model.fingerprint or "" for result in results),
        "commit": _distinct(result.model.commit or "" for result in results),
        "calibration, sha256": _distinct((r.calibration and r.calibration.fingerprint) or "" for r in results),
        "components from": _distinct(name for result in results for name in result.plugins),
    }
    return [(name, text) for name, text in facts.items() if text]


def notes(summary: Summary) -> list[tuple[str, str]]:
    """Every note with its configurations; of notes that differ only in numbers the first, and how many there are."""
    same: dict[str, list[tuple[str, Configuration]]] = {}
    for configuration in summary.configurations:
        for trial in configuration.trials:
            for note in dict.fromkeys(trial.result.notes if trial.result else ()):
                same.setdefault(re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", note), []).append((note, configuration))
    lines = []
    for found in same.values():
        names = list(dict.fromkeys(summary.name(configuration) for _, configuration in found))
        more = len({note for note, _ in found}) - 1
        listed = "; ".join(names) if len(names) <= MOST_VALUES else f"{len(names)} configurations"
        about = f"{listed}: {len(found)} of {len(summary.study.done)} trials"
        lines.append((found[0][0], about + (f", {more} with other numbers" if more else "")))
    return lines


def _machine(result: RunResult) -> str:
    known = {key: value for metric in result.metrics for key, value in metric.protocol.items() if value}
    parts = [str(known[name]) for name in ("accelerator", "processor") if name in known]
    parts += [f"{known['threads']} threads"] if "threads" in known else []
    return ", ".join([*parts, result.model.device] if parts else [])


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
