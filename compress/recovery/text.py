"""The sequences that a recovery trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...registry import DataError, TextSource
from ...registry.tensors.tokens import context_length
from ...registry.tensors.windows import cut_windows, digest, token_stream, with_bos
from ..files.recover import Recover
from ..models.loading import Loaded
from ..runs.documents import read_documents
from ..runs.preflight import check_context


def text_of(how: Recover, texts: Sequence[TextSource], loaded: Loaded) -> tuple[list[Tensor], dict[str, Any]]:
    """The sequences (t,) int64 to train on, drawn from all ``texts`` alike, and their description.

    Raises :class:`DataError` for sequences longer than the model's context, and for a text that is too short.
    """
    check_context("recover.length", how.length, context_length(loaded.model))
    documents = [document for text in texts for document in read_documents(text, loaded.tokenizer)]
    label = " + ".join(text.label for text in texts)
    sequences = training_sequences(documents, loaded.tokenizer, how, label)
    about = {"text": label, "sequences": len(sequences), "length": how.length, "fingerprint": digest(sequences)}
    return sequences, about


def training_sequences(documents: Sequence[str], tokenizer: Any, how: Recover, label: str) -> list[Tensor]:
    """Token ids (t,) int64: as many sequences as ``how`` asks for, or all up to those that the steps can use.

    They are drawn without replacement and start in the same way as calibration's. Raises :class:`DataError` for a text
    with too few tokens.
    """
    stream = with_bos(token_stream(documents, tokenizer), tokenizer)
    pieces = [window.ids for window in cut_windows(stream, how.length, tail="drop")]
    if not pieces:
        raise DataError(
            f"recover.length: {label} has {len(stream)} tokens, less than one sequence of {how.length}; shorten it, or "
            "name a longer text"
        )
    if how.sequences is not None and len(pieces) < how.sequences:
        raise DataError(
            f"recover.sequences: {label} gives {len(pieces)} sequences of {how.length} tokens ({len(stream)} tokens in "
            f"all), and {how.sequences} are asked for; lower it to {len(pieces)} or less, shorten recover.length, or "
            "name a longer text"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(how.seed))
    return [pieces[index] for index in order[: how.taken if how.sequences is None else how.sequences].tolist()]
