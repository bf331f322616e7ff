"""Perplexity of a text, with a protocol of everything that the value depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..registry import DataError, Evaluator, Measurement, NonFiniteError, SpecError, Subject, TextSource, hookimpl
from ..registry.tensors.tokens import check_token_ids, context_length
from ..registry.tensors.windows import BosPolicy, Tail, Window, cut_windows, digest, token_stream, with_bos
from .passes import Texts, device_of, setting, vocabulary_size
from .wikitext_words import read_pages

SLICE = 1 << 24
"""Most logits that are copied to float32 at a time (64 MB), for any batch and vocabulary."""


class Perplexity(Texts):
    """Perplexity of a text in windows; every scored token has the same weight.

    The text's documents are joined and tokenised as one stream, which is cut in windows of the same length. Windows run
    in text order, ``batch_size`` at a time, the shorter last one alone. The value is exp(sum of losses / tokens),
    losses in nats from a float32 log-softmax.

    With ``convention: wikitext_words`` the text is cut page by page as in lm-evaluation-harness' ``wikitext`` task, and
    the summed loss is also divided by words and by bytes of the text: word_perplexity, byte_perplexity, bits_per_byte.
    The windows of a batch have the same length, so that nothing is padded. Of the texts of a ``mixture`` whole windows
    are measured.
    """

    row_option: ClassVar[str | None] = "window"

    name: Literal["perplexity"] = "perplexity"
    convention: Literal["tokens", "wikitext_words"] = Field(
        default="tokens",
        description="tokens: one stream of tokens, as pruning papers do; wikitext_words: pages, and perplexity per "
        "word, as lm-evaluation-harness' wikitext task (its default is window: null)",
    )
    window: int | None = Field(
        default=512, ge=2, description="tokens the model sees at once; null: the model's context"
    )
    stride: int | None = Field(
        default=None,
        ge=1,
        description="tokens from one window's start to the next; null: no overlap. Tokens that an "
        "earlier window scored are only context",
    )
    bos: BosPolicy = Field(
        default="first",
        description="the tokenizer's BOS: never, once before the text (as in most published values), or "
        "as the first token of every window",
    )
    separator: str = Field(default="\n\n", description="the text between documents")
    tail: Tail = Field(default="keep", description="score the shorter last window, in its own batch, or drop it")
    batch_size: int = Field(default=20, ge=1, description="windows per batch; strategies that probe decide per batch")
    limit: int | None = Field(
        default=None, ge=1, description="measure at most this many windows (with wikitext_words: pages)"
    )

    @model_validator(mode="after")
    def _options_fit(self) -> Perplexity:
        if self.convention == "wikitext_words":
            own = {"stride": None, "bos": "first", "separator": "\n\n", "tail": "keep"}
            for key in [key for key, default in own.items() if getattr(self, key) != default]:
                raise ValueError(f"convention: wikitext_words has its own way to cut the text; leave {key} out")
            if self.mixture is not None:
                raise ValueError("convention: wikitext_words reads the pages of one text; leave mixture out")
        if self.stride is not None and self.window is not None:
            self._check_stride(self.window)
        return self

    def _check_stride(self, window: int) -> None:
        room = window - (self.bos == "every")
        if self.stride is not None and self.stride > room:
            raise ValueError(f"a stride of {self.stride} would skip text between windows of {room} tokens; lower it")

    def check(self, model: Any) -> None:
        """Raise SpecError for a window beyond the model's context."""
        self._window(model)

    def plan(self, subject: Subject) -> str:
        """Number and length of the windows, and the option for fewer; raises as :meth:`evaluate` for the text."""
        window = self._window(subject.model)
        windows = sum(map(len, self._read(subject, window)[0]))
        count = f"{windows:,} window{'s' * (windows != 1)} of {window} tokens"
        return count if self.limit else f"all {count}, fewer with limit"

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (window beyond the context), DataError (no text), NonFiniteError (NaN losses)."""
        runs, how, divisors, notes = self._read(subject, self._window(subject.model))
        windows = [*chain.from_iterable(runs)]
        losses, tokens = self._losses(subject, runs), [window.scored for window in windows]
        total = math.fsum(losses)
        loss = total / sum(tokens)
        values = {"perplexity": exponential(loss, "token", notes), "loss": loss}
        for unit, count in divisors.items():
            values[f"{unit}_perplexity"] = exponential(total / count, unit, notes)
        if "byte" in divisors:
            values["bits_per_byte"] = total / divisors["byte"] / math.log(2)
        protocol = {
            **self.about_texts(),
            "convention": self.convention,
            "revision": self._of_each(lambda text: text.revision),
            "documents": self._of_each(lambda text: text.limit or "all"),
            **how,
            "limit": self.limit,
            "windows": len(windows),
            "tokens": sum(tokens),
            "batch_size": self.batch_size,
            "order": "text order",
            "ids_sha256": digest(w.ids for w in windows),
            **setting(subject.model),
        }
        return Measurement(values, protocol, notes, {"window_losses": losses, "window_tokens": tokens})

    def _read(self, subject: Subject, window: int) -> tuple[list[list[Window]], dict, dict, list[str]]:
        """Windows of the texts in runs that share no batch, their part of the protocol, divisors of the loss, notes."""
        return (self._pages if self.convention == "wikitext_words" else self._stream)(subject, window)

    def _stream(self, subject: Subject, window: int) -> tuple[list[list[Window]], dict, dict, list[str]]:
        """Every text as one stream of tokens: windows, their part of the protocol, no other divisors, and notes."""
        bos_id = None if self.bos == "none" else subject.tokenizer.bos_token_id
        bos = self.bos if bos_id is not None else "none"
        cut = [self._windows(subject, text, window, bos, bos_id) for text in self.texts]
        how = {
            "separator": self.separator,
            "window": window,
            "stride": self.stride or window - (bos == "every"),
            "bos": bos,
            "tail": self._tail,
        }
        notes = [] if bos == self.bos else [f"the tokenizer has no BOS token, so bos: {self.bos} adds none"]
        return self.in_turn(cut), how, {}, notes

    def _windows(
        self, subject: Subject, text: TextSource, window: int, bos: BosPolicy, bos_id: int | None
    ) -> list[Window]:
        """The windows of one text, at most its share of ``limit``."""
        label, limit = text.label, self.limit
        ids = token_stream(subject.read(text), subject.tokenizer, self.separator)
        if len(ids) < 2:
            raise DataError(f"{label} has {len(ids)} tokens; perplexity takes at least 2: name a longer text")
        if bos == "first":
            ids = with_bos(ids, subject.tokenizer)
        check_token_ids(ids, vocabulary_size(subject.model), label)
        if self.mixture is not None and limit is not None:
            limit = max(limit // len(self.texts), 1)
        windows = cut_windows(ids, window, self.stride, bos_id if bos == "every" else None, self._tail)[:limit]
        if not windows:
            raise DataError(
                f"{label} has {len(ids)} tokens, less than one window of {window}, and the tail is dropped; "
                "shorten window, set tail: keep, or name a longer text"
            )
        return windows

    def _of_each(self, fact: Callable[[TextSource], Any]) -> Any:
        """A fact of the text, or a list with that of every text of a mixture."""
        return fact(self.text) if self.mixture is None else [fact(text) for text in self.mixture]

    @property
    def _tail(self) -> Tail:
        return self.tail if self.mixture is None else "drop"

    def _pages(self, subject: Subject, window: int) -> tuple[list[list[Window]], dict, dict, list[str]]:
        """The text page by page: windows, their part of the protocol, the other divisors of the loss, and notes."""
        found = read_pages(subject.read(self.text), subject.tokenizer, window, self.limit, self.text.label)
        for piece in found.windows:
            check_token_ids(piece.ids, vocabulary_size(subject.model), self.text.label)
        how = {
            "pages": found.pages,
            "words": found.words,
            "bytes": found.bytes,
            "window": window,
            "prefix": found.prefix,
            "text_as": f"detokenised by lm-eval {version('lm-eval')}; words and bytes before that",
        }
        return [found.windows], how, {"word": found.words, "byte": found.bytes}, []

    def _window(self, model: Any) -> int:
        context = context_length(model)
        window = self.window or context
        if window is None:
            raise SpecError("perplexity.window: this model's configuration has no context length; set window")
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

    def _losses(self, subject: Subject, runs: list[list[Window]]) -> list[float]:
        """Summed loss of every window in nats."""
        batches = [batch for run in runs for batch in _batches(run, self.batch_size)]
        device = device_of(subject.model)
        found: list[float] = []
        for batch in subject.progress(batches, "perplexity", len(batches)):
            shown = torch.stack([w.shown for w in batch]).to(device)
            with torch.no_grad():
                logits = subject.model(input_ids=shown, use_cache=False).logits
                losses = summed_losses(logits, torch.stack([w.ids for w in batch]), [w.scored for w in batch])
            del logits
            for number, loss in enumerate(losses, start=len(found)):
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"perplexity on {self.label}: the loss of window {number} is {loss} in "
                        f"{setting(subject.model)['dtype']}; try model.dtype: float32 (or bfloat16 for float16)"
                    )
            found += losses
        return found


def summed_losses(logits: Tensor, ids: Tensor, scored: list[int]) -> list[float]:
    """Sum of next-token losses in nats over the last ``scored`` tokens of each row; (B, T, V), (B, T) -> B numbers.

    ``ids`` may have one token more than ``logits``, which is then predicted too. Losses are float32, computed in slices
    of at most ``SLICE`` logits, and summed in float64.
    """
    step = max(1, SLICE // logits.shape[-1])
    last, ids = ids.shape[1] - 1, ids.to(logits.device)
    rows, parts = [], []
    for row, count in enumerate(scored):
        for start in range(last - count, last, step):
            stop = min(start + step, last)
            parts.append(
                cross_entropy(logits[row, start:stop].float(), ids[row, start + 1 : stop + 1], reduction="sum")
            )
            rows.append(row)
    sums = torch.stack(parts).cpu().double()  # one transfer, whatever the number of slices
    return torch.zeros(len(scored), dtype=torch.float64).index_add_(0, torch.tensor(rows), sums).tolist()


def exponential(loss: float, unit: str, notes: list[str]) -> float | None:
    """exp(loss), or None and a note if that is too large for a float."""
    if loss < 700:
        return math.exp(loss)
    notes.append(f"{loss:.0f} nats per {unit} are too many to write as a perplexity")
    return None


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
