"""Token ids: those that a model embeds, the positions that it was made for, rows of a batch, and where a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError


def context_length(model: Any) -> int | None:
    """The number of positions that the model was made for; None if its configuration does not say."""
    return context_of(model.config.get_text_config())


def context_of(config: Any) -> int | None:
    """The number of positions by a language model's configuration; None if it does not say.

    With rotary embeddings that are scaled by a factor, it is that many times the trained number: of
    ``original_max_position_embeddings``, or of ``max_position_embeddings`` where the kind of scaling keeps that.
    """
    positions = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if positions is None or not isinstance(factor, (int, float)):
        return positions
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if original is None and rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return positions
    return max(positions, int((original or positions) * factor))


def check_token_ids(ids: Tensor, vocabulary_size: int, place: str) -> None:
    """Raise :class:`DataError` for ids, of any shape, outside of ``vocabulary_size``: the tokenizer is another model's.

    ``place`` names where the ids come from.
    """
    if not ids.numel():
        return
    smallest, largest = int(ids.min()), int(ids.max())
    if smallest < 0 or largest >= vocabulary_size:
        found = smallest if smallest < 0 else largest
        raise DataError(
            f"{place} contains token id {found}, but the model embeds {vocabulary_size} ids only (0 to "
            f"{vocabulary_size - 1}); use the tokenizer that the model was trained with"
        )


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of ids as one batch (B, T), shorter rows with ``pad`` in front, and its attention mask (B, T); int64."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def ending_ids(model: Any) -> tuple[int, ...]:
    """The ids that end a text that the model generates; none where it does not say."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(found) if isinstance(found, (list, tuple)) else () if found is None else (int(found),)


def until_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The ids up to the first of ``ends``, which stays; all where there is none."""
    stop = next((place for place, token in enumerate(ids, start=1) if token in ends), len(ids))
    return list(ids[:stop])
