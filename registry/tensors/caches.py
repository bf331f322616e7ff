"""The key/value cache among the arguments of a call, whatever the model calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache of transformers, or an object that tells its length in the same way."""
    return hasattr(type(value), "get_seq_length")


def is_other_cache(name: str, value: Any) -> bool:
    """Whether an argument is a cache of another form by its name: tuples of keys and values, or pages."""
    plain = value is None or isinstance(value, (bool, int, Tensor)) or value in ((), [])
    return ("past" in name or "cache" in name) and not (plain or is_cache(value))


def cache_among(arguments: Mapping[str, Any]) -> Any:
    """The cache among arguments by name; None where there is none."""
    return next((value for value in arguments.values() if is_cache(value)), None)


def without_caches(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The other arguments."""
    return {key: value for key, value in arguments.items() if not (is_cache(value) or is_other_cache(key, value))}
