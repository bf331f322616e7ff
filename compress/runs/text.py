"""Cuts calibration batches from text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry import DataError
from ...registry.tensors.windows import cut_windows, digest, token_stream, with_bos


def calibration_batches(
    tokenizer: Any,
    texts: str | Sequence[str],
    sequences: int = 32,
    length: int = 512,
    batch_size: int = 8,
    seed: int = 0,
    label: str = "the calibration text",
) -> list[dict[str, Tensor]]:
    """Batches of ``input_ids`` and ``attention_mask`` (b, length), int64: sequences drawn without replacement.

    The texts are joined to one stream of tokens (one BOS first, where the tokenizer has one) and
    cut in sequences without overlap; ``sequences`` of them are drawn, in an order shuffled by ``seed``.
    The last batch may be smaller. Raises :class:`DataError` where the text has too few.
    """
    return in_batches(sequences_of(tokenizer, texts, sequences, length, seed, label), batch_size)


def sequences_of(
    tokenizer: Any,
    documents: str | Sequence[str],
    count: int,
    length: int,
    seed: int,
    label: str,
    texts: int = 1,
) -> Tensor:
    """Sequences of one of ``texts`` texts of a calibration; int64 (count, length), as calibration_batches draws them.

    Raises :class:`DataError` where the text has too few.
    """
    stream = with_bos(token_stream([documents] if isinstance(documents, str) else documents, tokenizer), tokenizer)
    pieces = [window.ids for window in cut_windows(stream, length, tail="drop")]
    if len(pieces) < count:
        wanted = f"asks for {count}" + (f" of it, one of {texts} texts" if texts > 1 else "")
        raise DataError(
            f"{label} gives {len(pieces)} sequences of {length} tokens ({len(stream)} tokens in all), but calibration "
            f"{wanted}; lower calibration.sequences to {len(pieces) * texts} or less, shorten calibration.length, "
            "or name a longer text"
            if pieces
            else f"{label} has {len(stream)} tokens, less than one sequence of {length}; shorten calibration.length "
            "or name a longer text"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return torch.stack([pieces[index] for index in order])


def in_batches(ids: Tensor, batch_size: int) -> list[dict[str, Tensor]]:
    """Token ids (n, length) as batches of ``input_ids`` and ``attention_mask``; the last may be smaller."""
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]


def fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """sha256 over the ids of all batches, their shapes and their order."""
    return digest(batch["input_ids"] for batch in batches)
