"""Text as one stream of token ids, and the windows that it is cut into, for calibration and measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DataError

BosPolicy = Literal["none", "first", "every"]
Tail = Literal["keep", "drop"]


@dataclass(frozen=True)
class Window:
    """A part of the stream for one pass of the model; the last ``scored`` of its tokens (w,) are scored.

    The last ``unseen`` of the tokens are predicted, but are not input of the model.
    """

    ids: Tensor
    scored: int
    unseen: int = 0

    @property
    def shown(self) -> Tensor:
        """The model's input ids (w - unseen,)."""
        return self.ids[: len(self.ids) - self.unseen]


def token_stream(documents: Sequence[str], tokenizer: Any, separator: str = "\n\n") -> Tensor:
    """Token ids (N,), int64, of all documents joined by ``separator`` and tokenised as one text.

    No special tokens are added. Published WikiText-2 perplexities join before tokenising, too. Raises
    :class:`DataError` for half of a surrogate pair, which no tokenizer takes.
    """
    text = separator.join(documents)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise DataError(
            f"the text holds half of a surrogate pair, as broken emoji leave, in {around!a}; write the whole "
            "character, or replace it"
        ) from None
    encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(encoded["input_ids"], dtype=torch.long)


def with_bos(ids: Tensor, tokenizer: Any) -> Tensor:
    """The stream (N,) with one BOS before it, if the tokenizer has one: (N + 1,) or (N,).

    A stream that begins with BOS, as chat templates write it, does not change.
    """
    if tokenizer.bos_token_id is None or (len(ids) and ids[0] == tokenizer.bos_token_id):
        return ids
    return torch.cat([torch.tensor([tokenizer.bos_token_id], dtype=ids.dtype), ids])


def cut_windows(
    ids: Tensor, length: int, stride: int | None = None, prefix: int | None = None, tail: Tail = "keep"
) -> list[Window]:
    """Windows of ``length`` tokens over the stream (N,), one every ``stride`` tokens (default: no overlap).

    ``prefix``, a token id, is the first token of every window and counts towards ``length``. A token that an earlier
    window has scored is context only, and so is the first token of a window without ``prefix``. The last window may be
    shorter; ``tail="drop"`` drops it then. Windows without scored tokens are left out.
    """
    room = length - (prefix is not None)
    step = room if stride is None else stride
    start_of_all = [] if prefix is None else [torch.tensor([prefix], dtype=ids.dtype)]
    found, seen = [], 0
    for start in range(0, len(ids), step):
        stop = min(start + room, len(ids))
        if stop - start < room and tail == "drop":
            break
        scored = stop - max(start, seen) - (seen <= start and prefix is None)
        if scored > 0:
            found.append(Window(torch.cat([*start_of_all, ids[start:stop]]), scored))
        seen = stop
        if stop == len(ids):
            break
    return found


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of token ids: for every tensor its shape, then its ids as little-endian int64."""
    total = hashlib.sha256()
    for ids in tensors:
        total.update(repr(tuple(ids.shape)).encode())
        total.update(ids.detach().cpu().to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return total.hexdigest()
