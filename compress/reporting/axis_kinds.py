"""What an axis of a study says: how a model is pruned, on what it is measured, or which repetition it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import yaml

from ..files.dotted import flatten
from .findings import Findings

USE, RATIO = "prune.use", "prune.ratio"

NAMED = {"strategy": USE, "ratio": RATIO}
"""Free names that say what they set, where no study's file does."""

COMPARED = (USE, "strategy")
"""Axes that are methods whatever else they set: a strategy may be calibrated as its authors calibrate it."""


def is_method(name: str, study: Findings) -> bool:
    """Whether an axis says how a model is pruned, so that its values compete.

    It does where all that it sets is of ``prune``, and not the ratio alone.
    """
    fields = axis_fields(name, study)
    if name in COMPARED:
        return True
    return not is_repetition(name) and _all_of(fields, "prune") and not _all_of(fields, RATIO)


def is_circumstance(name: str, study: Findings) -> bool:
    """Whether an axis says on what is measured (model, texts); so does one of which nothing is known."""
    return name not in COMPARED and not is_repetition(name) and not _all_of(axis_fields(name, study), "prune")


def is_protocol(name: str, study: Findings) -> bool:
    """Whether an axis says how a model is measured, among other things maybe."""
    return any(_all_of([field], "evaluate") for field in axis_fields(name, study))


def is_repetition(name: str) -> bool:
    """Whether an axis only repeats what is measured."""
    return name.endswith("seed") and name not in (USE, RATIO)


def axis_fields(name: str, study: Findings) -> list[str]:
    """The fields that an axis sets, by dotted key: its own, or those that the study's file has for a free name."""
    labels = _varied(study.text).get(name)
    if "." in name or not isinstance(labels, dict):
        return [NAMED.get(name, name)]
    fields = [(field, value) for label in labels.values() if isinstance(label, dict) for field, value in label.items()]
    return list(dict.fromkeys(key for field, value in fields for key in flatten(value, str(field)) or [str(field)]))


def _all_of(fields: list[str], part: str) -> bool:
    """Whether there are any fields, and all are of a part of the pipeline."""
    return bool(fields) and all(f"{field}.".startswith(f"{part}.") for field in fields)


@lru_cache(maxsize=64)
def _varied(text: str | None) -> dict[str, Any]:
    """The axes of a study's file; empty where there is none."""
    try:
        data = yaml.safe_load(text or "")
    except yaml.YAMLError:
        data = None
    vary = data.get("vary") if isinstance(data, dict) else None
    return vary if isinstance(vary, dict) else {}
