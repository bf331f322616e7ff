"""Perplexity of a text, with everything that the value depends on stated beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..registry import DataError, Evaluator, Measurement, NonFiniteError, SpecError, Subject, TextSource, hookimpl
from ..registry.tokens import check_token_ids, context_length
from ..registry.windows import BosPolicy, Tail, Window, cut_windows, digest, token_stream, with_bos
from .inputs import device_of, setting, vocabulary_size

SLICE = 1 << 24
"""Most logits that are copied to float32 at a time (64 MB), whatever batch and vocabulary."""


class Perplexity(Evaluator):
    """Perplexity of a text in windows, every scored token counting the same.

    The text's documents are joined and tokenised as one stream, which is cut in windows of the same
    length; windows run in text order, ``batch_size`` at a time, the shorter last one by itself. The
    value is exp(sum of losses / tokens scored), losses in nats from a float32 log-softmax.
    """

    name: Literal["perplexity"] = "perplexity"
    text: TextSource = Field(TextSource(bundled="reference-evaluation"), description="what to measure on")
    window: int | None = Field(512, ge=2, description="tokens the model sees at once; null: the model's context")
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens from one window's start to the next; null: no overlap. Tokens that an "
        "earlier window scored are context only",
    )
    bos: BosPolicy = Field(
        "first",
        description="the tokenizer's BOS: never, once before the text (as most published values), or "
        "before every window, where it takes one of its places",
    )
    separator: str = Field("\n\n", description="what stands between documents")
    tail: Tail = Field("keep", description="score the shorter last window, in a batch of its own, or drop it")
    batch_size: int = Field(20, ge=1, description="windows per batch; strategies that probe decide per batch")
    limit: int | None = Field(None, ge=1, description="measure at most this many windows")

    @model_validator(mode="after")
    def _windows_meet(self) -> Perplexity:
        if self.stride is not None and self.window is not None:
            self._check_stride(self.window)
        return self

    def _check_stride(self, window: int) -> None:
        room = window - (self.bos == "every")
        if self.stride is not None and self.stride > room:
            raise ValueError(f"a stride of {self.stride} would skip text between windows of {room} tokens; lower it")

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (window beyond the context), DataError (no text), NonFiniteError (NaN losses)."""
        model, label, window = subject.model, self.text.label, self._window(subject.model)
        bos_id = None if self.bos == "none" else subject.tokenizer.bos_token_id
        bos = self.bos if bos_id is not None else "none"
        ids = token_stream(subject.read(self.text), subject.tokenizer, self.separator)
        if len(ids) < 2:
            raise DataError(f"{label} has {len(ids)} tokens; perplexity takes at least 2: name a longer text")
        check_token_ids(ids, vocabulary_size(model), label)
        if bos == "first":
            ids = with_bos(ids, subject.tokenizer)
        windows = cut_windows(ids, window, self.stride, bos_id if bos == "every" else None, self.tail)[: self.limit]
        if not windows:
            raise DataError(
                f"{label} has {len(ids)} tokens, less than one window of {window}, and the tail is dropped; "
                "shorten window, set tail: keep, or name a longer text"
            )
        loss, tokens = self._loss(subject, windows)
        protocol = {
            "text": label,
            "revision": self.text.revision,
            "documents": self.text.limit or "all",
            "separator": self.separator,
            "window": window,
            "stride": self.stride or window - (bos == "every"),
            "bos": bos,
            "tail": self.tail,
            "limit": self.limit,
            "windows": len(windows),
            "tokens": tokens,
            "batch_size": self.batch_size,
            "order": "text order",
            "ids_sha256": digest(w.ids for w in windows),
            **setting(model),
        }
        notes = [] if bos == self.bos else [f"the tokenizer has no BOS token, so bos: {self.bos} adds none"]
        perplexity = math.exp(loss) if loss < 700 else None
        if perplexity is None:
            notes.append(f"{loss:.0f} nats per token are too many to write as a perplexity")
        return Measurement({"perplexity": perplexity, "loss": loss}, protocol, notes)

    def _window(self, model: Any) -> int:
        context = context_length(model)
        window = self.window or context
        if window is None:
            raise SpecError("perplexity.window: this model's configuration names no context; give window a number")
        if context is not None and window > context:
            raise SpecError(
                f"perplexity.window: {window} tokens are more than the model's context of {context}; "
                f"set window to {context} or less"
            )
        try:
            self._check_stride(window)
        except ValueError as error:
            raise SpecError(f"perplexity.stride: {error}") from None
        return window

    def _loss(self, subject: Subject, windows: list[Window]) -> tuple[float, int]:
        """Mean loss in nats and the number of tokens it is over."""
        batches = list(_batches(windows, self.batch_size))
        device, total, first = device_of(subject.model), 0.0, 0
        for batch in subject.progress(iter(batches), "perplexity", len(batches)):
            ids = torch.stack([w.ids for w in batch]).to(device)
            with torch.no_grad():
                logits = subject.model(input_ids=ids, use_cache=False).logits
                loss = summed_loss(logits, ids, [w.scored for w in batch])
            del logits
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"perplexity on {self.text.label}: the loss of windows {first} to {first + len(batch) - 1} is "
                    f"{loss} in {setting(subject.model)['dtype']}; try model.dtype: float32 (or bfloat16 for float16)"
                )
            total += loss
            first += len(batch)
        tokens = sum(w.scored for w in windows)
        return total / tokens, tokens


def summed_loss(logits: Tensor, ids: Tensor, scored: list[int]) -> float:
    """Sum of next-token losses in nats over the last ``scored`` tokens of each row; (B, T, V), (B, T) -> number.

    Float32 in slices of at most ``SLICE`` logits, summed in float64.
    """
    step = max(1, SLICE // logits.shape[-1])
    last = ids.shape[1] - 1
    parts = []
    for row, count in enumerate(scored):
        for start in range(last - count, last, step):
            stop = min(start + step, last)
            targets = ids[row, start + 1 : stop + 1].to(logits.device)
            parts.append(cross_entropy(logits[row, start:stop].float(), targets, reduction="sum"))
    return torch.stack(parts).cpu().double().sum().item()


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Consecutive windows of the same length, at most ``size`` together."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == size or len(window.ids) != len(batch[0].ids)):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Perplexity]
