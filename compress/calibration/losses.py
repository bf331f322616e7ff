"""The loss of the dense model with units cut at some sites, for allocators that measure.

A unit is cut by zeroes in the input of its consumer, so that no weight changes and every architecture works. The layers
before the first change of a count are not computed again: a pass resumes with what they returned for an earlier
candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...registry import DataError, ModelError, NonFiniteError, SpecError, Strategy
from ...registry.errors import FINITE_REMEDY
from ...registry.tensors.devices import device_of
from ..engine.decider import keep_highest
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from .passes import Batch, Dropped, Progress, channels_without, resumed, zeroed

LONGEST = 256
"""Most positions of a row that is measured."""

LOGITS = 2**27
"""Most bytes of the logits of one pass, in float32."""

IGNORED = -100
"""The target of a position that is not predicted."""


def check_output_layer(model: Any, strategy: Strategy) -> None:
    """Raise :class:`ModelError` where a part reads the loss of a model that predicts no tokens."""
    find = getattr(model, "get_output_embeddings", None)
    if find is not None and find() is not None:
        return
    allocator, scorer = strategy.allocator, strategy.scorer
    for reads, who, other in (
        (allocator.measures, f"allocator {allocator.name} measures", "allocator, such as uniform"),
        (strategy.scores_gradients, f"scorer {scorer.name} takes gradients of", "scorer, such as wanda_sp"),
    ):
        if reads:
            raise ModelError(
                f"{who} the loss of the next token, and this {type(model).__name__} has no output layer; load it with "
                f"AutoModelForCausalLM, or use another {other}"
            )


class CutLosses:
    """Measures candidates of an allocator: an :class:`~prunekit.registry.Evaluate`.

    ``known`` has the losses measured so far on this text, and gets the new ones. The model is as before after every
    call, also after one that fails. Raises :class:`SpecError` for counts that no site can keep, :class:`DataError` for
    a text without a token to predict, :class:`NonFiniteError` where the loss of the dense model is not finite.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch], known: MutableMapping[str, float], progress: Progress):
        self._engine, self._batches, self._known, self._progress = engine, batches, known, progress
        self._rows: dict[int, list[MeasuredRows]] = {}
        """The rows of the number of tokens that was asked for last."""

    def __call__(self, candidates: Sequence[Sequence[int]], tokens: int) -> list[float]:
        keys = [self._key(counts, tokens) for counts in candidates]
        missing = {key: counts for key, counts in zip(keys, candidates, strict=True) if key not in self._known}
        if missing:
            with self._engine.mode_of("dense"), self._uncompiled():
                parts = self._parts(tokens)
                if not all(math.isfinite(part.dense_loss) for part in parts):
                    raise NonFiniteError(
                        "the loss of the unpruned model on the calibration text is NaN or infinite, so no cut can be "
                        f"compared; nothing was pruned. {FINITE_REMEDY}"
                    )
                several = len(missing) > 1
                for key in self.progress(missing, "measuring cuts", len(missing)) if several else missing:
                    dropped = self._dropped(missing[key])
                    total = math.fsum(part.loss(missing[key], dropped) for part in parts)
                    loss = total / sum(part.predicted for part in parts)
                    self._known[key] = loss if math.isfinite(loss) else math.inf
        return [self._known[key] for key in keys]

    def progress(self, items: Iterable, label: str, total: int) -> Iterable:
        """``items``, whose progress is shown."""
        return self._progress(items, label, total)

    def _parts(self, tokens: int) -> list[MeasuredRows]:
        if tokens not in self._rows:
            rows = measured_rows(self._engine, self._batches, tokens)
            self._rows = {tokens: [MeasuredRows(self._engine, each) for each in rows]}
        return self._rows[tokens]

    def _uncompiled(self) -> AbstractContextManager:
        """Compiled code would be compiled anew for every candidate."""
        compiles = self._engine.shared.runtime.compile is not None
        return torch.compiler.set_stance("force_eager") if compiles else nullcontext()

    def _key(self, counts: Sequence[int], tokens: int) -> str:
        """What a loss depends on, apart from model and text: the scorer, the tokens, and the sites that are cut."""
        cuts, strategy = self._engine.cuts, self._engine.strategy
        whole = len(counts) == len(cuts)
        if not whole or not all(0 <= count <= cut.site.units for cut, count in zip(cuts, counts, strict=True)):
            raise SpecError(
                f"allocator {strategy.allocator.name} asks for the loss of {list(counts)!r:.200}; a candidate is a "
                f"kept count for each of {len(cuts)} sites, between 0 and all of its units; fix the plugin"
            )
        kind, options = strategy.scorer.identity
        cut_here = [
            f"{cut.site.consumer}={count}/{cut.site.units}"
            for cut, count in zip(cuts, counts, strict=True)
            if count < cut.site.units
        ]
        return " ".join([f"{kind.__module__}.{kind.__qualname__}", options, str(tokens), *cut_here])

    def _dropped(self, counts: Sequence[int]) -> Dropped:
        dropped: Dropped = {}
        for cut, count in zip(self._engine.cuts, counts, strict=True):
            if count < cut.site.units:
                dropped[cut] = channels_without(cut, keep_highest(self._scores[cut], count))
        return dropped

    @cached_property
    def _scores(self) -> dict[SiteCut, Tensor]:
        return {cut: self._engine.decider.scores(cut).units for cut in self._engine.cuts}


@dataclass(frozen=True, eq=False)
class Passed:
    """A candidate that rows were passed through."""

    counts: tuple[int, ...]
    outputs: list[Any]
    """What every layer returned."""
    loss: float
    """Sum over the predicted tokens, in nats."""


class MeasuredRows:
    """Rows of text, with what every layer returned for the last candidate and for the one that it was measured from.

    A candidate is measured from the one of the two with which it has more of the first layers in common. So an
    allocator that changes one site at a time repeats no layer before that site. Memory: two outputs (B, T, D) of every
    layer.
    """

    def __init__(self, engine: Engine, rows: Batch):
        self._engine, self._rows = engine, rows
        ids = rows["input_ids"]
        targets = ids if "attention_mask" not in rows else ids.masked_fill(rows["attention_mask"] == 0, IGNORED)
        self._targets = targets[:, 1:]
        self.predicted = int((self._targets != IGNORED).sum())
        """Number of predicted tokens."""
        dense = self._pass(tuple(cut.site.units for cut in engine.cuts), {}, [])
        self.dense_loss = dense.loss
        """Sum over the predicted tokens, in nats."""
        self._passed = [dense]

    def loss(self, counts: Sequence[int], dropped: Dropped) -> float:
        """The loss, summed over the predicted tokens, with zeroes in the channels ``dropped``."""
        parent = max(self._passed, key=lambda passed: self._agreement(passed, counts))
        first, different = self._agreement(parent, counts)
        if not different:
            return parent.loss
        found = self._pass(tuple(counts), dropped, parent.outputs[:first])
        self._passed = [parent, found]
        return found.loss

    def _agreement(self, passed: Passed, counts: Sequence[int]) -> tuple[int, int]:
        """The first layer where counts differ, and minus the number of sites where they do: the more, the better."""
        pairs = zip(self._engine.cuts, passed.counts, counts, strict=True)
        different = [cut.site.layer for cut, count, wanted in pairs if count != wanted]
        return min(different, default=len(self._engine.layers)), -len(different)

    def _pass(self, counts: tuple[int, ...], dropped: Dropped, known: list[Any]) -> Passed:
        """Pass the rows through the layers after those whose outputs are ``known``."""
        first = len(known)
        outputs = list(known)

        def keep(layer: nn.Module, args: tuple, output: Any) -> None:
            outputs.append(output)

        with ExitStack() as stack:
            if known:
                stack.enter_context(resumed(self._engine, first, known[-1]))
            for layer in self._engine.layers[first:]:
                stack.callback(layer.register_forward_hook(keep).remove)
            stack.enter_context(zeroed(dropped))
            return Passed(counts, outputs, self._loss())

    def _loss(self) -> float:
        device = device_of(self._engine.embeddings)
        model: Callable[..., Any] = self._engine.model
        logits = model(**{key: value.to(device) for key, value in self._rows.items()}, use_cache=False).logits
        targets = self._targets.to(logits.device).reshape(-1)
        logits = logits[:, :-1].reshape(len(targets), -1).float()
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()


def measured_rows(engine: Engine, batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """About ``tokens`` of the calibration text, at least one row: the beginnings of rows, spread evenly over it.

    Without their padding; rows of different lengths are padded at the end.
    """
    rows = [row for batch in batches for row in _real(batch) if len(row) > 1]
    if not rows:
        raise DataError(
            f"allocator {engine.strategy.allocator.name} measures the loss of the next token, and no row of the "
            "calibration text has two tokens; calibrate with longer sequences"
        )
    mean = sum(map(len, rows)) / len(rows)
    chosen = [rows[place] for place in spread(len(rows), round(tokens / mean))]
    at_once = max(1, LOGITS // (4 * engine.embeddings.num_embeddings * max(map(len, chosen))))
    return [_padded(chosen[start : start + at_once]) for start in range(0, len(chosen), at_once)]


def _real(batch: Batch) -> list[Tensor]:
    """The first real tokens of every row."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return [ids[real.bool()][:LONGEST] for ids, real in zip(batch["input_ids"], mask, strict=True)]


def _padded(rows: Sequence[Tensor]) -> Batch:
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    return {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask}


def spread(total: int, number: int) -> list[int]:
    """One place in each of ``number`` equal parts of ``total``: the first place of the first part, the second of the
    second, and so on. So texts that follow each other, and texts that take turns, are all met."""
    number = min(max(number, 1), total)
    return [part * total // number + part % (total // number) for part in range(number)]
