"""What a model can take: the token ids it embeds and the positions it was made for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DataError


def context_length(model: Any) -> int | None:
    """Most positions that the model was made for, where its configuration says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_token_ids(ids: Tensor, vocabulary_size: int, place: str) -> None:
    """Refuse ids, of any shape, that a model embedding ``vocabulary_size`` ids has no row for.

    ``place`` names where the ids come from. Raises :class:`DataError`: tokenizer and model do not belong together.
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
