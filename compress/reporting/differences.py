"""What two runs differ in: settings, where they come from, and results beside each other."""

from __future__ import annotations

from typing import Any

from ..files.dotted import flatten, resolved_settings
from ..output.formatting import number
from .findings import finite
from .protocols import fact

IGNORED = ("output.", "plugins")
"""Settings that say where results go, or are told by their components' providers."""

CIRCUMSTANCES = {
    "processor", "accelerator", "threads", "torch", "clock", "lm_eval", "dtype", "device", "attention", "meter",
    "pairs", "warmup", "breakdown", "prefill_samples", "decode_samples", "sites", "pruned_perplexity",
    "dense_perplexity", "pruned_seconds", "dense_seconds", "seed",
}  # fmt: skip
"""Protocol keys on which a value's meaning does not depend: machine, repetitions, and what is itself a finding."""

COUNTED = {"windows", "tokens", "pages", "words", "bytes", "documents", "ids_sha256"}
"""Protocol keys that follow from others; they are named where those are the same."""

OF_THE_MODEL = {"parameters", "parameters_ratio", "weights"}
"""Values that depend on no batch or text."""

RANDOM_IDS = "random ids"
"""How protocols name tokens that are no text."""

MOST_NAMED = 4
"""Differences of two protocols that are named in a sentence."""

ABSENT = object()
"""Stands for a key that one side does not have."""

Line = tuple[str, str, str]


def settings(a: str | None, b: str | None) -> list[Line]:
    """Settings of two resolved pipelines that differ: key, A's value, B's value."""
    left, right = resolved_settings(a), resolved_settings(b)
    found = _differing(left, right)
    # A part that one side has none of: its options say so already.
    parts = {key[:end] for key, *_ in found for end in range(len(key)) if key[end] == "."}
    return [line for line in found if line[0] not in parts and not line[0].startswith(IGNORED)]


def origins(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    """Differences in model, calibration text, machine, providers of components and versions."""
    return _differing(_origin(a), _origin(b))


def _origin(data: dict[str, Any]) -> dict[str, Any]:
    found = {f"model {key}": value for key, value in data["model"].items()}
    found |= {"calibration fingerprint": (data.get("calibration") or {}).get("fingerprint")}
    for outcome in data["metrics"]:
        machine = ("processor", "accelerator", "threads", "clock")
        found |= {key: outcome["protocol"][key] for key in machine if key in outcome["protocol"]}
    found |= {"components from": sorted(data.get("plugins") or {})}
    return found | {f"version of {name}": version for name, version in data["versions"].items()}


def protocols(a: dict[str, Any], b: dict[str, Any]) -> list[Line]:
    """Differences in how the evaluators that both have measured."""
    found: list[Line] = []
    for label, (left, right) in _shared(a, b).items():
        found += [(f"{label}: {key}", *rest) for key, *rest in _differing(left["protocol"], right["protocol"])]
    return [line for line in found if line[1] != line[2]]


def results(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Measurement, dense, A, B and what B is relative to A; one line for each value that either has.

    Dense values that are not the same stand beside each other; values that were measured otherwise get no relation.
    """
    sides = [{outcome["label"]: outcome for outcome in data["metrics"]} for data in (a, b)]
    rows = []
    for label in dict.fromkeys(label for side in sides for label in side):
        outcomes = [side.get(label) or {"pruned": {}, "dense": None} for side in sides]
        for name in dict.fromkeys(name for outcome in outcomes for name in outcome["pruned"]):
            first, second = (outcome["pruned"].get(name) for outcome in outcomes)
            if first is None and second is None:
                continue
            dense = [number((outcome["dense"] or {}).get(name)) for outcome in outcomes]
            said = dense[0] if dense[0] == dense[1] else " / ".join(dense)
            title = label if label == name else f"{label}: {name}"
            to = "-" if _unlike(name, *outcomes) else _relative(name, first, second)
            rows.append((title.replace("_", " "), said, number(first), number(second), to))
    return rows


def unlike(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """A sentence for every evaluator whose values cannot be related, with what was measured otherwise."""
    said = []
    for label, (left, right) in _shared(a, b).items():
        found: dict[str, None] = {}
        for name in left["pruned"].keys() & right["pruned"].keys():
            found |= dict.fromkeys(_unlike(name, left, right))
        if found:
            named = sorted(found)
            more = f" and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
            said.append(f"{label}: A and B do not compare: {', '.join(named[:MOST_NAMED])}{more}")
    return said


def _unlike(name: str, left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """What a value depends on and differs between two outcomes' protocols: ``length 128 against 256``."""
    if name in OF_THE_MODEL or not ("protocol" in left and "protocol" in right):
        return []
    first, second = (
        {key: _any_ids(value) for key, value in flatten(outcome["protocol"]).items()} for outcome in (left, right)
    )
    found = {key: rest for key, *rest in _differing(first, second) if _matters(key, name, first)}
    texts = {key.rpartition(".")[0] for key in first if key.endswith("ids_sha256") and first[key] == second.get(key)}
    for place in texts:  # the very same tokens, whatever the limit on them was
        found = {key: rest for key, rest in found.items() if key not in (_at(place, "limit"), _at(place, "documents"))}
    causes = {key: rest for key, rest in found.items() if key.rpartition(".")[2] not in COUNTED} or found
    return [f"{key.replace('_', ' ').replace('.', ' ')} {one} against {other}" for key, (one, other) in causes.items()]


def _matters(key: str, name: str, protocol: dict[str, Any]) -> bool:
    """Whether a value depends on a protocol's key: a step's on those of decoding, a task's on its own."""
    last, task = key.rpartition(".")[2], name.removesuffix("_stderr")
    if last in CIRCUMSTANCES or (last.startswith("decode") and not name.startswith("decode")):
        return False
    of_task = any(known.startswith(f"tasks.{task}.") for known in protocol)
    return not (of_task and key.startswith("tasks.")) or key.startswith(f"tasks.{task}.")


def _any_ids(value: Any) -> Any:
    """``random ids, seed 1`` without its seed: what is measured on random ids depends on how many they are."""
    return RANDOM_IDS if isinstance(value, str) and value.startswith(RANDOM_IDS) else value


def _at(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


def _relative(name: str, first: Any, second: Any) -> str:
    if finite(first) is None or finite(second) is None:
        return ""
    if first == second:
        return "same"
    if name == "loss" or not first or second / first <= 0:  # a logarithm, or no ratio to be had
        return f"{second - first:+.3g}"
    return f"x {second / first:.3g}"


def _shared(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    others = {outcome["label"]: outcome for outcome in b["metrics"]}
    return {o["label"]: (o, others[o["label"]]) for o in a["metrics"] if o["label"] in others}


def _differing(left: dict[str, Any], right: dict[str, Any]) -> list[Line]:
    keys = dict.fromkeys([*left, *right])
    pairs = [(key, left.get(key, ABSENT), right.get(key, ABSENT)) for key in keys]
    return [(key, _said(one), _said(other)) for key, one, other in pairs if one != other]


def _said(value: Any) -> str:
    return "-" if value is ABSENT else "none" if value is None else fact(value)
