"""The key/value cache among the arguments of a call, whatever the model calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache of transformers, or an object that tells its length in the same way."""
    return hasattr(type(value), "get_seq_length")


def is_bare_cache(name: str, value: Any) -> bool:
    """Whether an argument is a cache of the old form: keys and values in tuples or lists, without a class."""
    return isinstance(value, (tuple, list)) and len(value) > 0 and ("past" in name or "cache" in name)


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among arguments by name; None where there is none."""
    return next((value for value in arguments.values() if is_cache(value)), None)


def without_caches(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments."""
    return {key: value for key, value in arguments.items() if not (is_cache(value) or is_bare_cache(key, value))}
