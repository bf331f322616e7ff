"""The key/value cache among the arguments of a call, whatever the model calls it, and its size."""

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


def held(cache: Any, layer: int, tokens: int) -> int:
    """Positions that a cache holds of a layer which is about to read ``tokens`` more; layers run in their order.

    A layer of linear attention does not count its positions: they are those of a layer that does, if it has any state.
    """
    if counts_positions(cache, layer):
        return int(cache.get_seq_length(layer))
    states = getattr(cache.layers[layer], "has_previous_state", True)
    if not (any(states.values()) if isinstance(states, dict) else states):
        return 0
    counting = [place for place in range(len(cache.layers)) if counts_positions(cache, place)]
    if not counting:
        return 1  # how many is not known
    place = next((place for place in counting if place > layer), counting[-1])
    return int(cache.get_seq_length(place)) - (tokens if place < layer else 0)


def counts_positions(cache: Any, layer: int) -> bool:
    """Whether a cache tells how many positions it holds of a layer: not if the layer keeps other states than keys."""
    layers = getattr(cache, "layers", ())
    return layer >= len(layers) or hasattr(layers[layer], "get_seq_length")


def is_empty(cache: Any) -> bool:
    """Whether a cache holds nothing of any layer."""
    for place, layer in enumerate(getattr(cache, "layers", ())):
        states = getattr(layer, "has_previous_state", None)
        if any(states.values()) if isinstance(states, dict) else states:
            return False
        if counts_positions(cache, place) and int(cache.get_seq_length(place)):
            return False
    return hasattr(cache, "layers") or not int(cache.get_seq_length())


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds of its layers: keys, values and other states; 0 for None."""
    tensors = [tensor for layer in getattr(cache, "layers", ()) for tensor in _tensors(vars(layer))]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested mappings, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in inside for tensor in _tensors(item)]
