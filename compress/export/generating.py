"""Answers of a loaded model, pruned or not, and how fast they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TextStreamer

from ...evaluators.passes import device_of, short_pass, vocabulary_size
from ...registry import DataError, SpecError
from ...registry.tensors.caches import cache_bytes
from ...registry.tensors.tokens import check_token_ids, context_length, ending_ids, left_padded, until_end
from ..calibration.passes import Progress, no_progress
from ..models.loading import Loaded
from ..output.records import is_expert
from ..pruning.pruned import Pruned
from ..runs.prompts import Message, Prompt, encoded, prompts_of
from . import reload
from .evaluating import parts_of

Write = Callable[[str], object]
"""Takes the next piece of an answer."""


@dataclass(frozen=True)
class Answer:
    """What the model wrote to one prompt."""

    prompt: Prompt
    text: str
    tokens: list[int]
    """New ids, the EOS included."""
    prompt_tokens: int
    ended: bool
    """Whether it ends with an EOS; else it has as many tokens as were allowed."""

    @property
    def record(self) -> dict[str, Any]:
        """A line of the file of answers."""
        counts = {"prompt_tokens": self.prompt_tokens, "new_tokens": len(self.tokens), "ended": self.ended}
        return {**self.prompt.record, "answer": self.text, **counts}


@dataclass(frozen=True)
class Generated:
    """The answers of one model, and what they took."""

    answers: list[Answer]
    seconds: float
    """Wall-clock time of all batches."""
    first_token_seconds: float
    """From a batch's call to its first new token; the median of the batches."""
    token_seconds: float | None
    """From one token of every row of a batch to the next, the mean; None where no batch had two."""
    cache_bytes: int
    """Bytes of the key/value cache at the end of a batch, the most of all batches."""
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By kind of site: units that the last step computed with, and all units."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, by the time of all batches, prefill included."""
        return sum(len(answer.tokens) for answer in self.answers) / self.seconds

    @property
    def record(self) -> dict[str, Any]:
        """The measurements as plain data."""
        return {
            "prompts": len(self.answers),
            "prompt_tokens": sum(answer.prompt_tokens for answer in self.answers),
            "new_tokens": sum(len(answer.tokens) for answer in self.answers),
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "token_seconds": self.token_seconds,
            "cache_bytes": self.cache_bytes,
            "kept": {kind: {"kept": kept, "units": units} for kind, (kept, units) in self.kept.items()},
        }


def generate(
    model: nn.Module | Pruned | Loaded | reload.Export,
    prompts: str | Iterable[str | Prompt | Sequence[Message]],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    system: str | None = None,
    chat: bool = True,
    progress: Progress = no_progress,
    write: Write | None = None,
) -> Generated:
    """Answer prompts with a loaded model, or with a pruned one by its handle, and measure the time.

    A prompt is a text, or a chat's messages; both go through the tokenizer's chat template if it has one and ``chat``
    is true. ``batch_size`` prompts run together, padded on the left. Every batch starts from the calibrated histories,
    so that an answer depends on its batch alone, and they are so again at the end. Greedy with ``temperature`` 0, else
    sampled with ``seed``; other settings are those of ``model.generation_config``. ``write`` gets the pieces of an
    answer as they come, and a line break at its end, in batches of one. Within ``pruned.dense()`` the dense model
    answers.

    Raises :class:`SpecError` (options that cannot work) and :class:`DataError` (a prompt that cannot be used), which
    names the prompt.
    """
    net, tokenizer, pruned = parts_of(model, tokenizer, "generate", "to ask a model by its name")
    if tokenizer is None:
        raise SpecError("generate reads and writes text; pass tokenizer=")
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0:
        raise SpecError("generate: max_new_tokens and batch_size are at least 1, and temperature is at least 0")
    asked = prompts_of(prompts)
    rows = [encoded(prompt, tokenizer, system, chat) for prompt in asked]
    _check(net, asked, rows, max_new_tokens)
    if temperature:
        torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    short_pass(net, torch.tensor(rows[:1], device=device_of(net)))
    runs = []
    firsts = range(0, len(asked), batch_size)
    for first in progress(firsts, "answers", len(firsts)):
        if pruned is not None:
            pruned.reset()
        chosen = slice(first, first + batch_size)
        options = {"max_new_tokens": max_new_tokens, "num_beams": 1, **how}
        runs.append(_run(net, tokenizer, asked[chosen], rows[chosen], options, write))
    kept = {} if pruned is None else _kept(pruned)
    if pruned is not None:
        pruned.reset()
    gaps = [later - earlier for run in runs for earlier, later in pairwise(run.times)]
    return Generated(
        answers=[answer for run in runs for answer in run.answers],
        seconds=sum(run.seconds for run in runs),
        first_token_seconds=median(run.times[0] for run in runs),
        token_seconds=fmean(gaps) if gaps else None,
        cache_bytes=max(run.cache_bytes for run in runs),
        kept=kept,
    )


def by_kind(sites: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Kept units and all units of each kind of site, of (kind, kept, units) of every site; routed experts together."""
    found: dict[str, tuple[int, int]] = {}
    for kind, kept, units in sites:
        name = "expert channels" if is_expert(kind) else kind
        so_far = found.get(name, (0, 0))
        found[name] = so_far[0] + kept, so_far[1] + units
    return found


def _kept(pruned: Pruned) -> dict[str, tuple[int, int]]:
    computed = {place: len(units) for place, units in pruned.kept().items()}
    return by_kind((s.kind, computed.get((s.layer, s.kind), s.units), s.units) for s in pruned.all_sites)


def _check(model: nn.Module, asked: Sequence[Prompt], rows: Sequence[list[int]], new: int) -> None:
    """Raise :class:`DataError` for a prompt that the model cannot read, before anything is computed."""
    context, vocabulary = context_length(model), vocabulary_size(model)
    for prompt, ids in zip(asked, rows, strict=True):
        check_token_ids(torch.tensor(ids), vocabulary, prompt.place)
        if context is not None and len(ids) + new > context:
            raise DataError(
                f"{prompt.place}: {len(ids)} tokens and {new} new ones are more than the model's context of {context}; "
                + (f"ask for {context - len(ids)} new tokens or fewer" if len(ids) < context else "shorten the prompt")
            )


@dataclass(frozen=True)
class _Ran:
    """A batch: its answers, seconds from its call to each new token, seconds in all, bytes of its cache."""

    answers: list[Answer]
    times: list[float]
    seconds: float
    cache_bytes: int


def _run(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    rows: Sequence[list[int]],
    options: Mapping[str, Any],
    write: Write | None,
) -> _Ran:
    """Answer one batch, padded on the left."""
    ends = ending_ids(model)
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends) if i is not None), 0)
    ids, mask = left_padded(rows, pad)
    device = device_of(model)
    listener = _Listener(tokenizer, write if len(rows) == 1 else None)
    began = time.perf_counter()
    try:
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pad_token_id=pad,
            streamer=listener,
            return_dict_in_generate=True,
            **options,
        )
    except DataError as error:
        last = f" to {prompts[-1].place}" if len(prompts) > 1 else ""
        raise DataError(f"{prompts[0].place}{last}: {error}") from error
    seconds = time.perf_counter() - began
    answers = []
    for prompt, row, new in zip(prompts, rows, found.sequences[:, ids.shape[1] :].tolist(), strict=True):
        tokens = until_end(new, ends)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(Answer(prompt, text, tokens, len(row), bool(tokens) and tokens[-1] in ends))
    return _Ran(answers, [at - began for at in listener.times], seconds, cache_bytes(found.past_key_values))


class _Listener(TextStreamer):
    """Notes when tokens come, and passes on the text of a single row."""

    def __init__(self, tokenizer: Any, write: Write | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter())
        if self.write is not None:
            super().put(value)
        self.next_tokens_are_prompt = False

    def end(self) -> None:
        if self.write is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.write is not None:
            self.write(text + "\n" * stream_end)
