"""A resolved pipeline's settings by dotted key, as studies match and reports compare them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import yaml


def flatten(data: Any, place: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists of named components by their names, other lists as they are."""
    if isinstance(data, Mapping):
        items = [(str(key), value) for key, value in data.items()]
    elif isinstance(data, list) and data and all(isinstance(item, Mapping) and "name" in item for item in data):
        names = [str(item["name"]) for item in data]
        items = []
        for index, item in enumerate(data):
            number = f" {names[: index + 1].count(names[index])}" if names.count(names[index]) > 1 else ""
            items.append((names[index] + number, item))
    else:
        return {place: data}
    found: dict[str, Any] = {}
    for key, value in items:
        found.update(flatten(value, f"{place}.{key}" if place else key))
    return found


@lru_cache(maxsize=4096)
def resolved_settings(resolved: str | None) -> dict[str, Any]:
    """A resolved pipeline's settings by dotted key; empty where there is none."""
    try:
        data = yaml.safe_load(resolved) if resolved else None
    except yaml.YAMLError:
        data = None
    return flatten(data) if isinstance(data, dict) else {}
