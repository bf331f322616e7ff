"""Groups configurations by the dense model that they compare with: same weights, same protocols."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..files.dotted import flatten, resolved_settings
from .axes import key
from .metrics import KNOWN
from .trials import Trial

NOT_CHOSEN = ("processor", "threads", "torch", "accelerator", "sites")
"""Protocol keys of the machine, and of how much a pruned model left to measure."""

MEASURED = ("dense_", "pruned_")
"""Prefixes of protocol keys that repeat measured values."""


@dataclass
class DenseGroup:
    """Configurations that compare with the same dense model."""

    members: list[int] = field(default_factory=list)
    """Indices of the configurations, ascending."""
    protocols: dict[str, str] = field(default_factory=dict)
    """Protocol as text, by the label of every evaluator that any member ran."""


def dense_groups(trials: Sequence[Sequence[Trial]], settings: Sequence[Mapping[str, Any]]) -> list[DenseGroup]:
    """Group configurations, given by their finished trials and settings; ordered by the first member.

    Members have the same model fingerprint, and the same protocols of all evaluators that two of them ran. One that
    lacks an evaluator joins a group that has it, the one with the most similar settings. Keys that differ between the
    trials of one configuration depend on the seed and are ignored.
    """
    each = [{place: text for trial in configuration for place, text in _facts(trial)} for configuration in trials]
    by_seed = {
        place
        for configuration, last in zip(trials, each, strict=True)
        for trial in configuration
        for place, text in _facts(trial)
        if last[place] != text
    }
    known: list[dict[str, str]] = []
    for facts in each:
        labels: dict[str, dict[str, str]] = {}
        for (label, name), text in facts.items():
            labels.setdefault(label, {}).update({} if (label, name) in by_seed else {name: text})
        known.append({label: key(protocol) for label, protocol in labels.items()})
    groups: list[DenseGroup] = []
    # Configurations with most evaluators first: they determine what the others can join.
    for index in sorted(range(len(known)), key=lambda i: -len(known[i])):
        mine = known[index]
        fitting = [g for g in groups if all(mine[label] == g.protocols[label] for label in mine.keys() & g.protocols)]
        if fitting:
            chosen = max(fitting, key=lambda g: max(_common(settings[index], settings[m]) for m in g.members))
        else:
            groups.append(chosen := DenseGroup())
        chosen.members = sorted([*chosen.members, index])
        chosen.protocols = {**mine, **chosen.protocols}
    return sorted(groups, key=lambda group: group.members[0])


def _facts(trial: Trial) -> Iterator[tuple[tuple[str, str], str]]:
    """Label and key, and value as text, of all that identifies the trial's dense model; an empty label is the model.

    Machine, seeds and measured values are left out.
    """
    model = trial.result.model if trial.result else None
    yield ("", ""), key((model.fingerprint or model.name) if model else None)
    for metric in trial.metrics:
        start, protocol = f"evaluate.{metric.label}.", dict(metric.protocol)
        if metric.evaluator not in KNOWN:  # a plugin's protocol may contain results; its options are certain choices
            options = resolved_settings(trial.resolved)
            protocol = {k.removeprefix(start): value for k, value in options.items() if k.startswith(start)}
        yield (metric.label, ""), ""
        for name, value in flatten(protocol).items():
            last = name.rpartition(".")[2]
            if last not in NOT_CHOSEN and not last.endswith("seed") and not last.startswith(MEASURED):
                yield (metric.label, name), key(re.sub(r", seed \d+$", "", value) if isinstance(value, str) else value)


def _common(left: Mapping[str, Any], right: Mapping[str, Any]) -> int:
    """The number of equal settings."""
    return sum(key(left[name]) == key(right[name]) for name in left.keys() & right.keys())
