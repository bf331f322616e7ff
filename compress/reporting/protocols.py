"""How results were measured: protocols, each listed once, and the facts that all trials share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..files.dotted import resolved_settings
from ..output.formatting import number
from ..runs.records import RunResult
from .axes import finite
from .summary import Configuration, Summary
from .trials import Study, Trial

MOST_VALUES = 4
"""Maximum number of values listed of one key; more are counted."""

BETWEEN = " / "


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

    def of(self, label: str, trials: Iterable[Trial]) -> Protocol | None:
        """The protocol of an evaluator in these trials; None if it did not run."""
        found = [metric for trial in trials if (metric := trial.metric(label))]
        if not found:
            return None
        facts = tuple(merged(metric.protocol for metric in found).items())
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
    windows = [m.protocol for trial in study.done for m in trial.metrics if m.evaluator == "perplexity"]
    layers = (resolved_settings(trial.resolved).get("prune.skip_layers") for trial in study.done)
    versions = merged(result.versions for result in results)
    facts = {
        "Model": _distinct(map(_model, results)),
        "Measured on": _distinct(_text(protocol) for protocol in windows if protocol.get("text")),
        "Calibrated on": _distinct(map(_calibration, results)) or "nothing",
        "Layers not pruned": _distinct(map(_layers, layers)),
        "Machine": _distinct(map(_machine, results)),
        "Trials": _trials(study),
        "Run": " to ".join(dict.fromkeys(pick(result.started[:10] for result in results) for pick in (min, max))),
        "Software": ", ".join(f"{n} {versions[n]}" for n in ("prunekit", "torch", "transformers") if n in versions),
    }
    return [(name, text) for name, text in facts.items() if text]


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


def _model(result: RunResult) -> str:
    model = result.model
    size = f"{model.parameters / 1e9:.3g}\u00a0B" if model.parameters >= 1e9 else f"{model.parameters / 1e6:.3g}\u00a0M"
    return f"{model.name} ({model.architecture}, {size} parameters, {model.dtype})"


def _text(protocol: Mapping[str, Any]) -> str:
    parts = [fact(protocol["text"])]
    if protocol.get("tokens") and protocol.get("windows"):
        parts.append(f"{number(protocol['tokens'])} tokens scored in {protocol['windows']} windows")
    parts += [f"{name} {protocol[key]}" for key, name in (("window", "window"), ("batch_size", "batch"))
              if protocol.get(key)]  # fmt: skip
    return ", ".join(parts)


def _calibration(result: RunResult) -> str:
    found = result.calibration
    return f"{found.text}, {found.sequences} sequences of {found.length} tokens" if found else ""


def _layers(layers: Any) -> str:
    """``layers 0, 1``; empty where it is not known."""
    if not isinstance(layers, (list, tuple)):
        return ""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else "none"


def _machine(result: RunResult) -> str:
    known: dict[str, Any] = {}
    for metric in result.metrics:
        known.update({k: v for k, v in metric.protocol.items() if k in ("accelerator", "processor", "threads") and v})
    parts = [str(known[name]) for name in ("accelerator", "processor") if name in known]
    parts += [f"{known['threads']} thread{'s' * (known['threads'] != 1)}"] if "threads" in known else []
    return ", ".join([*parts, result.model.device] if parts else [])


def _trials(study: Study) -> str:
    parts = [f"{len(study.done)} done"]
    parts += [f"{len(study.failed)} failed"] if study.failed else []
    parts += [f"{study.waiting} waiting"] if study.waiting else []
    seconds = sum(trial.seconds or 0 for trial in study.trials)
    if not seconds:
        return ", ".join(parts)
    duration = f"{seconds:.0f}\u00a0s" if seconds < 100 else f"{seconds / 60:.0f}\u00a0min"
    return ", ".join([*parts, duration if seconds < 6000 else f"{seconds / 3600:.1f}\u00a0h"])


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
