"""What the evaluators ask of a model before they run it, and the batch of tokens they run it on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..registry import DataError, Subject, TextSource
from ..registry.tensors import devices
from ..registry.tensors.tokens import check_token_ids, context_length
from ..registry.tensors.windows import token_stream, with_bos

OWN_ATTENTION = "prunekit_"
"""Begins the name of an attention that a pruned model runs instead of the one named after it, and computes the same."""


def device_of(model: Any) -> torch.device:
    """Where the model wants its token ids, and computes first."""
    return devices.device_of(model.get_input_embeddings())


def vocabulary_size(model: Any) -> int:
    """How many token ids the model embeds."""
    return model.get_input_embeddings().num_embeddings


def clamped(length: int, model: Any) -> int:
    """``length``, or the model's context where that is shorter."""
    return min(length, context_length(model) or length)


def setting(model: Any) -> dict[str, Any]:
    """The part of a protocol that every measurement shares."""
    return {
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "device": "+".join(devices.places_of(model)) or str(device_of(model)),
        "attention": (getattr(model.config, "_attn_implementation", None) or "").removeprefix(OWN_ATTENTION) or None,
    }


def random_ids(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Ids drawn evenly from the model's vocabulary by a seeded CPU generator; (rows, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_size(model), (rows, length), generator=generator)


def one_batch(subject: Subject, text: TextSource | None, rows: int, length: int, seed: int) -> Tensor:
    """The first ``rows * length`` tokens of ``text``, or random ids without one; (rows, length) on the model's device.

    Raises :class:`DataError` where the text is too short.
    """
    if text is None:
        return random_ids(subject.model, rows, length, seed).to(device_of(subject.model))
    return text_batches(subject, text, 1, rows, length)[0]


def text_batches(subject: Subject, text: TextSource, batches: int, rows: int, length: int) -> list[Tensor]:
    """The text's first tokens as ``batches`` batches (rows, length) int64 in text order, on the model's device.

    One BOS comes first, where the tokenizer has one. Raises :class:`DataError` where the text is too short.
    """
    stream = with_bos(token_stream(subject.read(text), subject.tokenizer), subject.tokenizer)
    needed = batches * rows * length
    if len(stream) < needed:
        many = batches > 1
        taking = f"{batches} batches of {rows} x {length} take" if many else f"a batch of {rows} x {length} takes"
        raise DataError(
            f"{text.label} has {len(stream)} tokens, and {taking} {needed}; "
            f"lower {'batches, ' if many else ''}batch_size or length, or name a longer text"
        )
    check_token_ids(stream, vocabulary_size(subject.model), text.label)
    return list(stream[:needed].to(device_of(subject.model)).view(batches, rows, length))


def batch_text(text: TextSource | None, seed: int) -> str:
    """How a protocol names the tokens of :func:`one_batch`."""
    return f"random ids, seed {seed}" if text is None else text.label
