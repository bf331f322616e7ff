"""A resolved pipeline's settings by dotted key, as studies match and reports compare them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..output.reading import read_text
from .yaml_plain import plain_data


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


def resolved_text(path: Path) -> str | None:
    """The text of a resolved pipeline file; ``None`` where there is none. Raises :class:`SpecError`."""
    try:
        return read_text(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}; copy it again from where it was whole") from None


@lru_cache(maxsize=4096)
def resolved_settings(resolved: str | None) -> dict[str, Any]:
    """A resolved pipeline's settings by dotted key; empty where there is none."""
    try:
        data = plain_data(resolved, "resolved.yaml") if resolved else None
    except SpecError:
        data = None
    return flatten(data) if isinstance(data, dict) else {}
