"""The axes of a study: their titles, their values as text, and what each one varies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ...registry import SpecError
from ..files.dotted import flatten
from ..files.yaml_plain import plain_data
from ..output.formatting import TITLES, sentence, share

USE, RATIO = "prune.use", "prune.ratio"

FREE_NAMES = {"strategy": USE, "ratio": RATIO}
"""Axis names with a known meaning, for studies whose file does not define them."""

STRATEGY_AXES = (USE, "strategy")
"""Axes that are methods whatever else they set: a strategy may bring its own calibration."""


def finite(value: Any) -> float | None:
    """The value if it is a finite number, else None (results.json holds infinity and NaN as text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def key(value: Any) -> str:
    """A text that is equal for equal settings."""
    return json.dumps(value, sort_keys=True, default=str)


def axis_title(name: str) -> str:
    """The axis as reports call it: prune.use -> strategy, prune.selector.rows -> selector rows."""
    special = {USE: "strategy", RATIO: "ratio"}
    parts = [part for part in name.removeprefix("prune.").split(".") if not part.isdigit() and part != "evaluate"]
    return special.get(name, " ".join(parts).replace("_", " ") or name)


def setting_text(name: str, value: Any) -> str:
    """A setting's value as text: 40%, PP, a mapping as ``name key value``."""
    if name.endswith("ratio") and finite(value) is not None and 0 <= value <= 1:
        return share(value)
    if name.endswith(("use", "strategy")) and isinstance(value, str):
        return TITLES.get(value, value)
    if isinstance(value, Mapping):
        options = {key: item for key, item in value.items() if key not in ("name", "use")}
        component = value.get("name", value.get("use"))
        return " ".join(filter(None, ("" if component is None else str(component), sentence(options))))
    if isinstance(value, (list, tuple)):
        return " ".join(setting_text("", item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and name.startswith("prune."):
        return value.replace("_", " ")  # a component's name
    return "none" if value is None else str(value)


def equation(name: str, value: Any) -> str:
    """``text = other``."""
    return f"{axis_title(name)} = {setting_text(name, value)}"


def named_text(name: str, value: Any) -> str:
    """:func:`setting_text`, or an :func:`equation` where the value alone is not clear."""
    return setting_text(name, value) if isinstance(value, str) or name.endswith("ratio") else equation(name, value)


def called(texts: Sequence[str], *more: str) -> str:
    """The first text, with the others in parentheses: ``PP (40%, least squares)``; ``more`` after a semicolon."""
    inside = "; ".join(filter(None, (", ".join(texts[1:]), *more)))
    return f"{texts[0]} ({inside})" if inside else texts[0]


def is_repetition(name: str) -> bool:
    """Whether the axis repeats the same measurement (a seed)."""
    return name.endswith("seed")


def is_method(name: str, study_file: str | None) -> bool:
    """Whether the axis varies how a model is pruned, so that its values compete.

    All its fields are of ``prune``, and not the ratio alone.
    """
    if name in STRATEGY_AXES:
        return True
    fields = _fields(name, study_file)
    return not is_repetition(name) and _all_of(fields, "prune") and not _all_of(fields, RATIO)


def is_condition(name: str, study_file: str | None) -> bool:
    """Whether the axis varies the model or the texts; an axis of unknown fields counts as one."""
    return name not in STRATEGY_AXES and not is_repetition(name) and not _all_of(_fields(name, study_file), "prune")


def is_protocol(name: str, study_file: str | None) -> bool:
    """Whether the axis varies how a model is measured, possibly among other things."""
    return any(_all_of([field], "evaluate") for field in _fields(name, study_file))


def _fields(name: str, study_file: str | None) -> list[str]:
    """Dotted keys that the axis sets: its own, or for a free name those in the study's file."""
    values = _vary(study_file).get(name)
    if "." in name or not isinstance(values, dict):
        return [FREE_NAMES.get(name, name)]
    pairs = [(field, value) for label in values.values() if isinstance(label, dict) for field, value in label.items()]
    return list(dict.fromkeys(key for field, value in pairs for key in flatten(value, str(field)) or [str(field)]))


def _all_of(fields: list[str], part: str) -> bool:
    """Whether there are fields, and all belong to this part of the pipeline."""
    return bool(fields) and all(f"{field}.".startswith(f"{part}.") for field in fields)


@lru_cache(maxsize=64)
def _vary(study_file: str | None) -> dict[str, Any]:
    """The ``vary`` section of a study's file; empty if there is none."""
    try:
        data = plain_data(study_file or "", "study")
    except SpecError:
        data = None
    vary = data.get("vary") if isinstance(data, dict) else None
    return vary if isinstance(vary, dict) else {}
