"""The batches that evaluators run, the forward passes that they measure, and the settings that all of them report."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import Field, model_serializer, model_validator
from torch import Tensor

from ..registry import DataError, Evaluator, SpecError, Subject, TextSource
from ..registry.tensors import devices
from ..registry.tensors.tokens import check_token_ids, context_length
from ..registry.tensors.windows import token_stream, with_bos
from ..registry.text import without_defaults

OWN_ATTENTION = "prunekit_"
"""Prefix of an attention implementation that a pruned model runs and that computes the same as the one without it."""

SHORT = 8
"""Tokens of the short pass after a change between pruned and dense."""


Row = TypeVar("Row")

LATER = {"mixture": None, "mixed": False}
"""Options that are newer than stored results, with their defaults, which are not written: keys of trials stay equal."""


class Texts(Evaluator):
    """An evaluator of the rows of one text, or of several, whose rows share batches or do not."""

    text: TextSource = Field(default=TextSource(bundled="reference-evaluation"), description="what to measure on")
    mixture: tuple[TextSource, ...] | None = Field(
        default=None, description="several texts instead of text; equally many rows of each are measured"
    )
    mixed: bool = Field(
        default=False,
        description="with mixture: rows of all texts take turns in every batch; false: a batch has one text",
    )

    @model_validator(mode="after")
    def _several_texts(self) -> Texts:
        if self.mixture is not None and len(set(self.mixture)) < max(len(self.mixture), 2):
            raise ValueError("mixture is of two or more texts, each named once; of one text use text")
        if self.mixture is not None and self.text != type(self).model_fields["text"].default:
            raise ValueError("mixture takes the place of text; leave one of them out")
        if self.mixed and self.mixture is None:
            raise ValueError("mixed needs several texts; name them in mixture, or leave mixed out")
        return self

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: Any) -> dict[str, Any]:
        return without_defaults(handler(self), LATER)

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The texts whose rows are measured."""
        return self.mixture or (self.text,)

    @property
    def label(self) -> str:
        """The name of the text, or of all of them, in reports."""
        return " + ".join(text.label for text in self.texts)

    def about_texts(self) -> dict[str, Any]:
        """The texts' part of the protocol."""
        how = {} if self.mixture is None else {"batches": "of all texts in turn" if self.mixed else "of one text each"}
        return {"text": self.label, **how}

    def in_turn(self, rows: Sequence[Sequence[Row]]) -> list[list[Row]]:
        """The rows of every text, equally many of each, in runs; no batch goes from one run into the next."""
        least = min(map(len, rows))
        runs = [list(each[:least]) for each in rows]
        return [[row for turn in zip(*runs, strict=True) for row in turn]] if self.mixed else runs


class OneBatch(Evaluator):
    """An evaluator that runs one batch of random tokens, or of a text's first tokens."""

    row_option: ClassVar[str | None] = "length"

    batch_size: int = Field(default=20, ge=1, description="sequences of the batch")
    length: int = Field(default=256, ge=1, description="tokens of each sequence, at most the model's context")
    text: TextSource | None = Field(default=None, description="the text to take tokens from; null: random tokens")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the random tokens")

    def plan(self, subject: Subject) -> str:
        """The shape of the batch; raises :class:`DataError` if the text is too short."""
        length = clamped(self.length, subject.model)
        self.batch(subject, length)
        return f"a batch of {self.batch_size} x {length} tokens"

    def batch(self, subject: Subject, length: int) -> Tensor:
        """Ids (batch_size, length) int64 on the model's device; raises :class:`DataError` if the text is too short."""
        if self.text is not None:
            return text_batches(subject, self.text, 1, self.batch_size, length)[0]
        return random_ids(subject.model, self.batch_size, length, self.seed).to(device_of(subject.model))

    def about_batch(self, length: int) -> dict[str, Any]:
        """The batch's part of the protocol; ``length`` is that of the measured prefill."""
        text = f"random ids, seed {self.seed}" if self.text is None else self.text.label
        return {"text": text, "batch_size": self.batch_size, "length": length}


class Decoding(OneBatch):
    """An evaluator that runs a prefill and decode steps after it."""

    decode_steps: int = Field(
        default=16, ge=0, description="tokens for each sequence after the prefill; 0: prefill only"
    )

    def check(self, model: Any) -> None:
        """Raise :class:`SpecError` if prefill and decode steps do not fit in the model's context."""
        self.prompt_length(model)

    def prompt_length(self, model: Any) -> int:
        """Tokens of the prefill: ``length``, or the model's context if that is shorter.

        Raises :class:`SpecError` if the decode steps do not fit in the context after it.
        """
        context, prompt, steps = context_length(model), clamped(self.length, model), self.decode_steps
        if context is not None and steps and prompt + steps > context:
            room = context - steps
            remedy = f"set length to {room} or less, or decode_steps: 0" if room > 0 else "lower decode_steps"
            raise SpecError(
                f"{self.name}.decode_steps: a prefill of {prompt} tokens and {steps} steps after it take "
                f"{prompt + steps} positions, more than the model's context of {context}; {remedy}"
            )
        return prompt


class TextBatches(Evaluator):
    """An evaluator that runs several batches of a text."""

    row_option: ClassVar[str | None] = "length"

    text: TextSource = Field(default=TextSource(bundled="reference-evaluation"), description="what to run on")
    batch_size: int = Field(
        default=20, ge=1, description="sequences of a batch; strategies that probe decide per batch"
    )
    length: int = Field(default=256, ge=1, description="tokens of each sequence, at most the model's context")
    batches: int = Field(default=2, ge=1, description="batches to run")

    def plan(self, subject: Subject) -> str:
        """Number and shape of the batches; raises :class:`DataError` if the text is too short."""
        self.read_batches(subject)
        return f"{self.batches} batches of {self.batch_size} x {clamped(self.length, subject.model)} tokens"

    def read_batches(self, subject: Subject) -> tuple[list[Tensor], dict[str, Any]]:
        """The batches (batch_size, length) int64 in text order, and their part of the protocol.

        Raises :class:`DataError` if the text is too short.
        """
        length = clamped(self.length, subject.model)
        found = text_batches(subject, self.text, self.batches, self.batch_size, length)
        about = {"batch_size": self.batch_size, "length": length, "batches": self.batches}
        return found, {"text": self.text.label, **about}


def device_of(model: Any) -> torch.device:
    """The device of the input embeddings, where the token ids go."""
    return devices.device_of(model.get_input_embeddings())


def vocabulary_size(model: Any) -> int:
    """Number of token ids that the model embeds."""
    return model.get_input_embeddings().num_embeddings


def clamped(length: int, model: Any) -> int:
    """``length``, or the model's context if that is shorter."""
    return min(length, context_length(model) or length)


def setting(model: Any) -> dict[str, Any]:
    """The part of a protocol that every measurement has."""
    return {
        "dtype": str(model.get_input_embeddings().weight.dtype).removeprefix("torch."),
        "device": "+".join(devices.places_of(model)) or str(device_of(model)),
        "attention": (getattr(model.config, "_attn_implementation", None) or "").removeprefix(OWN_ATTENTION) or None,
    }


def random_ids(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Ids drawn uniformly from the model's vocabulary by a seeded CPU generator; (rows, length) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary_size(model), (rows, length), generator=generator)


def text_batches(subject: Subject, text: TextSource, batches: int, rows: int, length: int) -> list[Tensor]:
    """The text's first tokens as ``batches`` batches (rows, length) int64 in text order, on the model's device.

    The first token is BOS if the tokenizer has one. Raises :class:`DataError` if the text is too short.
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


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of ids (B, T), at every position and without a cache."""
    return model(input_ids=ids, use_cache=False).logits


def short_pass(model: Any, ids: Tensor) -> None:
    """A short pass on the beginning of ids (B, T), in which a static cut gathers its weights and folds compensation in.

    Run before a measurement, so that this is not measured.
    """
    prefill(model, ids[:1, :SHORT])


@torch.no_grad()
def cached_prefill(model: Any, ids: Tensor) -> Any:
    """The key/value cache after ids (B, T); raises :class:`SpecError` for a model without one."""
    cache = model(input_ids=ids, use_cache=True).past_key_values
    if cache is None:
        raise SpecError(f"{type(model).__name__} has no key/value cache, so there are no decode steps; set them to 0")
    return cache


@torch.no_grad()
def decode_step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits (B, 1, V) of one more token for every row, ids (B, 1), which are added to ``cache``."""
    return model(input_ids=ids, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def next_logits(model: Any, ids: Tensor, cache: Any = None, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Logits (B, V) after the last of ids (B, T), and the key/value cache with them added.

    ``mask`` (B, tokens so far) has zeros for padding on the left. Raises :class:`SpecError` for a model without a
    cache.
    """
    takes = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {} if cache is None else {"past_key_values": cache}
    if "logits_to_keep" in takes:
        arguments["logits_to_keep"] = 1
    if mask is not None and not bool(mask.all()):
        arguments["attention_mask"] = mask
        if "position_ids" in takes:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    found = model(input_ids=ids, use_cache=True, **arguments)
    if found.past_key_values is None:
        raise SpecError(f"{type(model).__name__} has no key/value cache, so it does not decode token by token here")
    return found.logits[:, -1], found.past_key_values
