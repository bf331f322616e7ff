"""What all trials of a report have in common, for the head of the page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..files.dotted import resolved_settings
from ..output.formatting import number
from .findings import Findings, Trial, setting_text
from .protocols import fact, merged


def facts(findings: Findings) -> list[tuple[str, str]]:
    """Model, texts, machine, trials and date; what differs between trials is listed."""
    done = [trial.data for trial in findings.done]
    models = _distinct(_model(data["model"]) for data in done)
    calibrations = _distinct(_calibration(data["calibration"]) for data in done if data.get("calibration"))
    texts = _distinct(
        _text(outcome["protocol"])
        for trial in findings.done
        for outcome in trial.outcomes
        if outcome["protocol"].get("text") and outcome["evaluator"] == "perplexity"
    )
    machines = _distinct(_machine(data) for data in done)
    said = [
        ("Model", models),
        ("Measured on", texts),
        ("Calibrated on", calibrations or "nothing"),
        ("Skipped layers", _distinct(_skipped(trial) for trial in findings.done)),
        ("Machine", machines),
        ("Trials", _trials(findings)),
        ("Run", _dates(data["started"] for data in done)),
        ("Software", _software(done)),
    ]
    return [(name, text) for name, text in said if text]


def versions(findings: Findings) -> dict[str, str]:
    """Versions of all trials, those that differ listed."""
    return merged([trial.data["versions"] for trial in findings.done]) or merged([findings.versions])


def identities(findings: Findings) -> list[tuple[str, str]]:
    """Fingerprints and plugins: what tells whether another run is of the same things."""
    done = [trial.data for trial in findings.done]
    said = [
        ("weights, sha256", _distinct(str(data["model"].get("fingerprint") or "") for data in done)),
        ("commit", _distinct(str(data["model"].get("commit") or "") for data in done)),
        ("calibration, sha256", _distinct((data.get("calibration") or {}).get("fingerprint", "") for data in done)),
        ("components from", _distinct(name for data in done for name in data.get("plugins") or {})),
    ]
    return [(name, text) for name, text in said if text]


def _model(model: dict[str, Any]) -> str:
    parameters = model.get("parameters") or 0
    size = f"{parameters / 1e9:.3g}\u00a0B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}\u00a0M"
    return f"{model['name']} ({model.get('architecture')}, {size} parameters, {model.get('dtype')})"


def _text(protocol: dict[str, Any]) -> str:
    said = [f"{fact(protocol['text'])}"]
    if protocol.get("tokens") and protocol.get("windows"):
        said.append(f"{number(protocol['tokens'])} tokens scored in {protocol['windows']} windows")
    if protocol.get("window"):
        said.append(f"window {protocol['window']}")
    if protocol.get("batch_size"):
        said.append(f"batch {protocol['batch_size']}")
    return ", ".join(said)


def _calibration(calibration: dict[str, Any]) -> str:
    return f"{calibration['text']}, {calibration['sequences']} sequences of {calibration['length']} tokens"


def _skipped(trial: Trial) -> str:
    """The layers that the pipeline says are not pruned; nothing where it is not known."""
    layers = resolved_settings(trial.resolved).get("prune.skip_layers")
    return "" if layers is None else setting_text("prune.skip_layers", layers)


def _machine(data: dict[str, Any]) -> str:
    protocols = [outcome["protocol"] for outcome in data["metrics"]]
    known: dict[str, Any] = {}
    for protocol in protocols:
        known.update({key: protocol[key] for key in ("accelerator", "processor", "threads") if protocol.get(key)})
    said = [str(known[key]) for key in ("accelerator", "processor") if key in known]
    said += [f"{known['threads']} thread{'s' * (known['threads'] != 1)}"] if "threads" in known else []
    return ", ".join([*said, str(data["model"].get("device", ""))] if said else [])


def _trials(findings: Findings) -> str:
    said = [f"{len(findings.done)} done"]
    said += [f"{len(findings.failed)} failed"] if findings.failed else []
    said += [f"{findings.waiting} waiting"] if findings.waiting else []
    spent = sum(trial.seconds or 0 for trial in findings.trials)
    return ", ".join(said) + (f", {_duration(spent)}" if spent else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f}\u00a0s"
    return f"{seconds / 60:.0f}\u00a0min" if seconds < 6000 else f"{seconds / 3600:.1f}\u00a0h"


def _dates(started: Iterable[str]) -> str:
    days = sorted({text[:10] for text in started})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _software(done: list[dict[str, Any]]) -> str:
    found = merged([data["versions"] for data in done])
    return ", ".join(f"{name} {found[name]}" for name in ("prunekit", "torch", "transformers") if name in found)


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(text for text in texts if text))
