"""A model as lm-evaluation-harness wants it, which tells the model what is padding. Imports lm-eval: import it late."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import lm_eval.api.task
import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import pad

from ..registry import DataError, NonFiniteError, Subject
from ..registry.tensors.tokens import check_token_ids
from .inputs import device_of, setting, vocabulary_size

LOGGERS = ("lm_eval", "transformers.tokenization_utils_base", "datasets", "huggingface_hub")


class MaskedLM(HFLM):
    """The subject's model for lm-eval, with an attention mask wherever a batch has padding.

    lm-eval fills shorter rows of a batch up with token 0 on the right and passes no mask, and token 0 may well be a
    real token. So all ids are one higher while lm-eval handles them: 0 is then padding and nothing else. They are put
    back before the model sees them, and the logits get a column in front to agree with lm-eval's ids. The order of
    the requests, by length and then by ids, stays the same.

    Requests run task by task, each beginning with the calibrated histories: no result depends on the other tasks.
    """

    def __init__(self, subject: Subject, batch_size: int, max_length: int | None):
        # lm-eval gives a tokenizer without a padding token one; ours stays as it is.
        tokenizer = copy.deepcopy(subject.tokenizer)
        super().__init__(
            pretrained=subject.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            logits_cache=True,
            softmax_dtype="float32",
        )
        self._device = device_of(subject.model)
        self._subject = subject
        self._task = ""
        self._steps: Iterator = iter(())
        self.shortened = 0
        """Prompts of which the beginning was cut away because they were longer than ``max_length``."""

    @property
    def adds_bos(self) -> bool:
        """Whether lm-eval begins prompts with the tokenizer's BOS."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tok_encode("a")[:1] == [bos]

    # What lm-eval calls. Its progress bars are off, ours shows batches.

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return self._by_task(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        return self._by_task(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        def run(chosen: list, disable_tqdm: bool) -> list[str]:
            with self._progress(math.ceil(len(chosen) / self.batch_size)):
                return super(MaskedLM, self).generate_until(chosen, disable_tqdm=disable_tqdm)

        return self._by_task(run, requests)

    def _by_task(self, run: Callable[..., list], requests: list) -> list:
        answers: list[Any] = [None] * len(requests)
        for self._task in dict.fromkeys(request.task_name for request in requests):
            chosen = [index for index, request in enumerate(requests) if request.task_name == self._task]
            self._subject.reset()
            found = run([requests[index] for index in chosen], disable_tqdm=True)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
        return answers

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of (key, context ids, continuation ids), and whether each is the model's first choice."""
        requests = list(requests)
        self._check(requests)
        shifted = [(key, [i + 1 for i in context], [i + 1 for i in then]) for key, context, then in requests]
        # lm-eval runs requests that differ in their last token only as one row.
        rows = len({(*context, *then[:-1]) for _, context, then in shifted})
        # A rolling log-likelihood comes in one call per batch: that is no progress to speak of.
        with self._progress(0 if override_bs else math.ceil(rows / self.batch_size)):
            answers = super()._loglikelihood_tokens(shifted, disable_tqdm=True, override_bs=override_bs)
        if any(math.isnan(value) for value, _ in answers):
            raise NonFiniteError(
                f"task {self._task}: a log-likelihood is NaN in {setting(self.model)['dtype']}; try model.dtype: "
                "float32 (or bfloat16 for float16)"
            )
        return answers

    def _check(self, requests: list) -> None:
        longest = max((len(then) for *_, then in requests), default=0)
        if longest > self.max_length:
            raise DataError(
                f"task {self._task}: an answer of {longest} tokens does not fit into max_length: {self.max_length}; "
                "raise it, or leave the task out"
            )
        if not all(context and then for _, context, then in requests):
            raise DataError(f"task {self._task}: an answer, or the context before it, has no tokens; mend the task")
        ids = [(min(part), max(part)) for _, *parts in requests for part in parts]
        check_token_ids(torch.tensor(ids), vocabulary_size(self.model), f"task {self._task}")
        self.shortened += sum(len(context) + len(then) > self.max_length + 1 for _, context, then in requests)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits (B, T, 1 + V) for ids one higher than the tokenizer's and 0 for padding (B, T)."""
        real = inps != 0
        masked = {} if bool(real.all()) else {"attention_mask": real.long()}
        next(self._steps, None)
        with torch.no_grad(), self._explained():
            logits = self.model(input_ids=(inps - 1).clamp(min=0), use_cache=False, **masked).logits
        return pad(logits.to(inps.device), (1, 0), value=-torch.inf)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Tensor:
        next(self._steps, None)
        with torch.no_grad(), self._explained():
            return super()._model_generate(*args, **kwargs)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what to do about prompts that the model, as it was pruned, cannot take."""
        try:
            yield
        except DataError as error:
            raise DataError(
                f"task {self._task}, with prompts of up to {self.max_length} tokens: {error}. For zero_shot: lower its "
                "max_length, or raise calibration.length"
            ) from error

    @contextmanager
    def _progress(self, batches: int) -> Iterator[None]:
        label = f"zero_shot {self._task}"
        self._steps = iter(self._subject.progress(iter(range(batches)), label, batches)) if batches else iter(())
        try:
            yield
            for _ in self._steps:  # so that the display ends
                pass
        finally:
            self._steps = iter(())


@contextmanager
def quiet() -> Iterator[None]:
    """Within it lm-eval and the libraries it loads data with write nothing to the terminal."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    tqdm = lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, *args, **kwargs: items
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = tqdm
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
