"""Training sequences of a recovery: a text as one stream, cut without overlap, drawn with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry import DataError
from ...registry.tensors.windows import cut_windows, token_stream, with_bos


def training_sequences(
    documents: Sequence[str], tokenizer: Any, length: int, wanted: int | None, most: int, seed: int, label: str
) -> list[Tensor]:
    """Token ids (length,) int64: ``wanted`` sequences, or all up to ``most``.

    They are drawn without replacement and start in the same way as calibration's. Raises :class:`DataError` for a text
    with too few tokens.
    """
    stream = with_bos(token_stream(documents, tokenizer), tokenizer)
    pieces = [window.ids for window in cut_windows(stream, length, tail="drop")]
    if not pieces:
        raise DataError(
            f"{label} has {len(stream)} tokens, less than one sequence of {length}; shorten --length, or name a longer "
            "text"
        )
    if wanted is not None and len(pieces) < wanted:
        raise DataError(
            f"{label} gives {len(pieces)} sequences of {length} tokens ({len(stream)} tokens in all), --sequences asks "
            f"for {wanted}; lower it to {len(pieces)} or less, shorten --length, or name a longer text"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[index] for index in order[: most if wanted is None else wanted].tolist()]
