"""Limits of a model's input: the token ids that it embeds and the positions that it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DataError


def context_length(model: Any) -> int | None:
    """The number of positions that the model was made for; None if its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


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
