"""How a model continues prompts: perplexity of a reference, agreement with the dense model, repetition.

Letters: B rows, T tokens of the longest prompt, N tokens of a continuation, V ids of the vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.nn.functional import cross_entropy

from ..registry import DataError, Evaluator, Measurement, NonFiniteError, SpecError, Subject, TextSource, hookimpl
from ..registry.tensors.tokens import check_token_ids, context_length, ending_ids, left_padded, until_end
from ..registry.tensors.windows import digest, token_stream
from .passes import Texts, device_of, next_logits, setting, vocabulary_size
from .perplexity import exponential


@dataclass(frozen=True)
class Case:
    """A prompt and its reference continuation, as ids."""

    prompt: list[int]
    reference: list[int]


@dataclass(frozen=True)
class Continued:
    """One case continued: the reference's summed loss in nats, and the greedy ids, an EOS included."""

    loss: float
    greedy: list[int]


class Continuation(Texts):
    """Perplexity of reference continuations, agreement of greedy tokens with the dense model, and repetition.

    A prompt runs once and fills a key/value cache. The reference is then read token by token through that cache, and
    from a copy of it the greedy tokens are generated: so what a strategy decides from a prompt holds for both. Values:

    - ``perplexity`` and ``loss`` of the references after their prompts;
    - ``agreement``, the share of the dense model's greedy tokens that the pruned model has at the same place, and
      ``same_start``, the share of them before the first difference; means over the prompts;
    - ``repetition`` of the greedy tokens, 1 - distinct n-grams / n-grams; mean over the prompts.

    Continuations lie at equal distances in the text, wherever their prompts begin, so that prompts of other lengths
    have the same references. With ``answers`` every document of ``text`` is a prompt, and prompts of a batch are padded
    on the left. Greedy tokens end with the model's EOS. Every batch starts from the calibrated histories.
    """

    paired: ClassVar[bool] = True
    paper: ClassVar[str] = "repetition: Welleck et al., ICLR 2020, arXiv 1908.04319"
    row_option: ClassVar[str | None] = "prompt_length"

    name: Literal["continuation"] = "continuation"
    answers: TextSource | None = Field(
        default=None,
        description="the reference continuation of every document of text, which is then one prompt; null: what "
        "follows a prompt in the text",
    )
    prompt_length: int = Field(default=64, ge=1, description="tokens of a prompt; with answers, at most")
    length: int = Field(default=32, ge=1, description="tokens of a continuation; of an answer, the first ones")
    prompts: int = Field(default=20, ge=1, description="prompts to continue; with answers, at most")
    bos: Literal["none", "every"] = Field(
        default="every", description="every: prompts begin with the tokenizer's BOS, if it has one"
    )
    apply_chat_template: bool = Field(
        default=False, description="with answers: prompts are a user's turn by the tokenizer's chat template"
    )
    ngram: int = Field(default=4, ge=1, description="tokens of the n-grams whose repetition is counted")
    batch_size: int = Field(default=1, ge=1, description="prompts per batch; strategies that probe decide per batch")

    @model_validator(mode="after")
    def _template_has_prompts(self) -> Continuation:
        if self.apply_chat_template and self.answers is None:
            raise ValueError("apply_chat_template is for whole prompts; name their answers, or leave it out")
        if self.mixture is not None and self.answers is not None:
            raise ValueError("answers belong to the prompts of one text; leave mixture out")
        if self.prompts < len(self.texts):
            raise ValueError(f"prompts: {self.prompts} cannot be shared by {len(self.texts)} texts; set it higher")
        return self

    def check(self, model: Any) -> None:
        """Raise SpecError where a prompt and its continuation do not fit in the model's context."""
        context = context_length(model)
        if context is not None and self.prompt_length + self.length > context:
            raise SpecError(
                f"continuation.prompt_length: {self.prompt_length} tokens and {self.length} after them are more than "
                f"the model's context of {context}; lower prompt_length or length"
            )

    def plan(self, subject: Subject) -> str:
        """Number of prompts, and tokens of prompts and continuations; raises as :meth:`evaluate` for the text."""
        most = "up to " if self.answers else ""
        count = sum(map(len, self._runs(subject)))
        return f"{count} prompts of {most}{self.prompt_length} tokens, {most}{self.length} tokens after each"

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (context too short), DataError (text) and NonFiniteError (NaN losses)."""
        found = self.alone(subject)
        if not subject.sites:
            return found
        with subject.dense():
            dense = subject.measure(Alone(**dict(self)))
        rows = zip(found.details["greedy"], dense.details["greedy"], strict=True)
        equal = [same(own, other) for own, other in rows]
        agreement = [fmean(row) for row in equal]
        values = {
            **found.values,
            **{f"dense_{name}": value for name, value in dense.values.items()},
            "agreement": fmean(agreement),
            "same_start": fmean([*row, False].index(False) / len(row) for row in equal),
        }
        details = {**found.details, "agreement": agreement, "dense_texts": dense.details["texts"]}
        return Measurement(values, found.protocol, list(dict.fromkeys([*found.notes, *dense.notes])), details)

    def alone(self, subject: Subject) -> Measurement:
        """What is measured of one model, without a second one."""
        self.check(subject.model)
        runs = self._runs(subject)
        cases, size = [*chain.from_iterable(runs)], self.batch_size
        batches = [run[start : start + size] for run in runs for start in range(0, len(run), size)]
        found: list[Continued] = []
        for batch in subject.progress(batches, self.name, len(batches)):
            subject.reset()
            found += self._continued(subject, batch, len(found))
        notes: list[str] = []
        values = self._values(subject, cases, found, notes)
        details = {
            "window_losses": [one.loss for one in found],
            "window_tokens": [len(case.reference) for case in cases],
            "greedy": [one.greedy for one in found],
            "texts": [subject.tokenizer.decode(one.greedy) for one in found],
        }
        return Measurement(values, self._protocol(subject, cases), notes, details)

    def _protocol(self, subject: Subject, cases: Sequence[Case]) -> dict[str, Any]:
        parts = (part for case in cases for part in (case.prompt, case.reference))
        return {
            **self.about_texts(),
            "answers": None if self.answers is None else self.answers.label,
            "prompts": len(cases),
            "prompt_length": self.prompt_length,
            "length": self.length,
            "tokens": sum(len(case.reference) for case in cases),
            "bos": self._bos(subject.tokenizer) is not None,
            "chat_template": self.apply_chat_template,
            "batch_size": self.batch_size,
            "padding": "left, with attention mask" if self.answers else "none",
            "perplexity": "of the reference, token by token through the cache that its prompt filled",
            "agreement": "share of the dense model's greedy tokens, up to its EOS, at the same place",
            "repetition": f"1 - distinct / all {self.ngram}-grams of the greedy tokens",
            "order": "text order; every batch from the calibrated histories",
            "ids_sha256": digest(torch.tensor(part) for part in parts),
            **setting(subject.model),
        }

    def _values(
        self, subject: Subject, cases: Sequence[Case], found: Sequence[Continued], notes: list[str]
    ) -> dict[str, float | int | None]:
        loss = math.fsum(one.loss for one in found) / sum(len(case.reference) for case in cases)
        ends = ending_ids(subject.model)
        shares = [repetition([i for i in one.greedy if i not in ends], self.ngram) for one in found]
        known = [share for share in shares if share is not None]
        return {
            "perplexity": exponential(loss, "token", notes),
            "loss": loss,
            "repetition": fmean(known) if known else None,
        }

    def _bos(self, tokenizer: Any) -> int | None:
        return None if self.bos == "none" or self.apply_chat_template else tokenizer.bos_token_id

    def _runs(self, subject: Subject) -> list[list[Case]]:
        """The cases, in runs that share no batch."""
        if self.answers is None:
            runs = self.in_turn([self._in_stream(subject, text) for text in self.texts])
        else:
            runs = [list(self._answered(subject, self.answers))]
        for case in chain.from_iterable(runs):
            check_token_ids(torch.tensor([*case.prompt, *case.reference]), vocabulary_size(subject.model), self.label)
        return runs

    def _in_stream(self, subject: Subject, text: TextSource) -> list[Case]:
        """Continuations at equal distances, each with the tokens before it as its prompt."""
        stream, prompts = token_stream(subject.read(text), subject.tokenizer).tolist(), self.prompts // len(self.texts)
        bos = self._bos(subject.tokenizer)
        before = self.prompt_length - (bos is not None)
        apart, needed = (len(stream) - self.length) // prompts, max(before, self.length)
        if apart < needed:
            raise DataError(
                f"{text.label} has {len(stream)} tokens, and {prompts} prompts take "
                f"{prompts * needed + self.length}; lower prompts, prompt_length or length, or name a longer text"
            )
        starts = range(apart, apart * prompts + 1, apart)
        begin = [] if bos is None else [bos]
        return [
            Case([*begin, *stream[start - before : start]], stream[start : start + self.length]) for start in starts
        ]

    def _answered(self, subject: Subject, answers: TextSource) -> Iterator[Case]:
        """Every document as a prompt, with its answer."""
        tokenizer = subject.tokenizer
        if self.apply_chat_template and not tokenizer.chat_template:
            raise SpecError(
                "continuation.apply_chat_template: the tokenizer has no chat template; use an instruction-tuned model, "
                "or set it to false"
            )
        asked, known = subject.read(self.text), subject.read(answers)
        if len(asked) != len(known):
            raise DataError(
                f"continuation.answers: {answers.label} has {len(known)} documents for the {len(asked)} of "
                f"{self.text.label}; name as many"
            )
        bos = self._bos(tokenizer)
        for number, (text, answer) in enumerate(zip(asked, known, strict=True), start=1):
            if number > self.prompts:
                return
            if self.apply_chat_template:
                turns = [{"role": "user", "content": text}]
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompt = [*([] if bos is None else [bos]), *token_stream([text], tokenizer).tolist()]
            reference = token_stream([answer], tokenizer).tolist()[: self.length]
            if not prompt or not reference or len(prompt) > self.prompt_length:
                found = f"a prompt of {len(prompt)} tokens and an answer of {len(reference)}"
                raise DataError(
                    f"{self.text.label}, document {number}: {found}; a prompt has 1 to {self.prompt_length} "
                    "(continuation.prompt_length), an answer at least 1"
                )
            yield Case(prompt, reference)

    def _continued(self, subject: Subject, batch: Sequence[Case], number: int) -> list[Continued]:
        """The cases of one batch, continued; the first has this number in the text."""
        found = continued(subject.model, batch, self.length, subject.tokenizer.pad_token_id or 0)
        for index, one in enumerate(found, start=number):
            if not math.isfinite(one.loss):
                raise NonFiniteError(
                    f"continuation on {self.label}: the loss after prompt {index} is {one.loss} in "
                    f"{setting(subject.model)['dtype']}; try model.dtype: float32 (or bfloat16 for float16)"
                )
        return found


class Alone(Continuation):
    """The dense model's part of a measurement, which the runs of one loaded model share."""

    def evaluate(self, subject: Subject) -> Measurement:
        return self.alone(subject)


@torch.no_grad()
def continued(model: Any, batch: Sequence[Case], length: int, pad: int) -> list[Continued]:
    """References and ``length`` greedy tokens after the prompts of one batch, which run once, padded on the left."""
    device, ends = device_of(model), ending_ids(model)
    ids, mask = (part.to(device) for part in left_padded([case.prompt for case in batch], pad))
    logits, cache = next_logits(model, ids, None, mask)
    copied = copy.deepcopy(cache)
    longest = max(len(case.reference) for case in batch)
    references = torch.tensor(
        [case.reference + [-100] * (longest - len(case.reference)) for case in batch], device=device
    )
    losses = torch.zeros(len(batch), dtype=torch.float64)
    first, seen = logits, mask
    for place in range(longest):
        wanted = references[:, place]
        losses += cross_entropy(logits.float(), wanted.to(logits.device), reduction="none").cpu()
        if place < longest - 1:
            seen = torch.cat([seen, seen.new_ones(len(batch), 1)], dim=1)
            logits, cache = next_logits(model, wanted.clamp(min=0)[:, None], cache, seen)
    logits, cache, seen = first, copied, mask
    chosen = [logits.argmax(-1)]
    while len(chosen) < length:
        seen = torch.cat([seen, seen.new_ones(len(batch), 1)], dim=1)
        logits, cache = next_logits(model, chosen[-1].to(device)[:, None], cache, seen)
        chosen.append(logits.argmax(-1))
    greedy = torch.stack(chosen, dim=1).tolist()
    return [Continued(loss, until_end(row, ends)) for loss, row in zip(losses.tolist(), greedy, strict=True)]


def same(own: Sequence[int], dense: Sequence[int]) -> list[bool]:
    """For each of the dense model's tokens, whether the other has it at the same place."""
    return [place < len(own) and own[place] == token for place, token in enumerate(dense)]


def repetition(ids: Sequence[int], n: int) -> float | None:
    """1 - distinct n-grams / n-grams of a text (seq-rep-n); None for fewer than n tokens."""
    grams = [tuple(ids[start : start + n]) for start in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Continuation]
