"""Which configurations were measured beside the same dense model, by the same protocols."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..files.dotted import resolved_settings
from .columns import KNOWN
from .configurations import key as key_of
from .findings import Trial

Facts = dict[str, dict[str, str]]
"""Evaluator's label -> what its protocol says, key -> value as text."""

PASSING = ("processor", "threads", "torch", "accelerator", "sites")
"""Protocol keys that are no choice of the measurer: the machine, and how much a pruning left to look at."""

FOUND = ("dense_", "pruned_")
"""How keys begin under which a protocol repeats measured values."""


@dataclass
class Reference:
    """Configurations that were measured beside one dense model."""

    members: list[int] = field(default_factory=list)
    """Indices of the configurations, ascending."""
    facts: Facts = field(default_factory=dict)
    """What is known of every evaluator that any of them ran."""


def references(configurations: Sequence[Sequence[Trial]], settings: Sequence[Mapping[str, Any]]) -> list[Reference]:
    """Group configurations, given as their finished trials and settings, in the order of their first member.

    Members have the model's fingerprint in common, and the protocols of all evaluators that two of them ran. One that
    lacks an evaluator joins those that have it, of several the one whose settings are most like its own. What differs
    between a configuration's own trials goes by the seed and tells nothing apart.
    """
    each = [[_facts(trial) for trial in trials] for trials in configurations]
    by_seed = {(label, key) for trials in each for label, key in _differing(trials)}
    found: list[Reference] = []
    merged = [_without(trials, by_seed) for trials in each]
    # Those with most evaluators first: they say what the others can join.
    for index in sorted(range(len(merged)), key=lambda i: -len(merged[i])):
        facts = merged[index]
        fitting = [reference for reference in found if _agree(facts, reference.facts)]
        if fitting:
            chosen = max(fitting, key=lambda r: max(_alike(settings[index], settings[m]) for m in r.members))
        else:
            found.append(chosen := Reference())
        chosen.members.append(index)
        chosen.facts = {**facts, **chosen.facts}
    for reference in found:
        reference.members.sort()
    return sorted(found, key=lambda reference: reference.members[0])


def _facts(trial: Trial) -> Facts:
    """What identifies the dense measurements of one trial; the model stands under an empty label."""
    model = trial.data["model"]
    found: Facts = {"": {"fingerprint": key_of(model.get("fingerprint") or model.get("name"))}}
    for outcome in trial.outcomes:
        label = outcome["label"]
        if outcome["evaluator"] in KNOWN:
            found[label] = _chosen(outcome["protocol"])
        else:
            # A stranger's protocol may hold anything, results of the pruning too; its options are chosen for sure.
            start = f"evaluate.{label}."
            options = {k: v for k, v in resolved_settings(trial.resolved).items() if k.startswith(start)}
            found[label] = _chosen({key.removeprefix(start): value for key, value in options.items()})
    return found


def _chosen(protocol: Mapping[str, Any]) -> dict[str, str]:
    """A protocol's facts but for machine, seeds and measured values, as text; parts of parts as dotted keys."""
    found: dict[str, str] = {}
    for key, value in protocol.items():
        if key in PASSING or key.endswith("seed") or key.startswith(FOUND):
            continue
        if isinstance(value, Mapping):
            found.update({f"{key}.{name}": text for name, text in _chosen(value).items()})
        else:
            found[key] = key_of(re.sub(r", seed \d+$", "", value) if isinstance(value, str) else value)
    return found


def _differing(trials: Sequence[Facts]) -> set[tuple[str, str]]:
    """Labels and keys whose values differ between a configuration's trials."""
    seen: dict[tuple[str, str], set[str]] = {}
    for facts in trials:
        for label, known in facts.items():
            for key, text in known.items():
                seen.setdefault((label, key), set()).add(text)
    return {place for place, texts in seen.items() if len(texts) > 1}


def _without(trials: Sequence[Facts], places: set[tuple[str, str]]) -> Facts:
    """All trials' facts together, without those at some places."""
    merged: Facts = {}
    for facts in trials:
        for label, known in facts.items():
            merged.setdefault(label, {}).update({k: v for k, v in known.items() if (label, k) not in places})
    return merged


def _agree(left: Facts, right: Facts) -> bool:
    return all(left[label] == right[label] for label in left.keys() & right.keys())


def _alike(left: Mapping[str, Any], right: Mapping[str, Any]) -> int:
    """How many settings agree."""
    return sum(key_of(left[name]) == key_of(right[name]) for name in left.keys() & right.keys())
