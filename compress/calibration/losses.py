"""The loss of the dense model with units cut at some sites, or its divergence, for allocators that measure.

A unit is cut by zeroes in the input of its consumer, a whole block by zeroes in the output of its consumer, so that no
weight changes and every architecture works. The layers before the first change of a count are not computed again: a
pass resumes with what they returned for an earlier candidate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...registry import MEASURED_LENGTH, DataError, ModelError, NonFiniteError, Objective, SpecError, Strategy
from ...registry.errors import FINITE_REMEDY
from ...registry.tensors.devices import device_of
from ..engine.decider import keep_highest
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from .passes import Batch, Progress, resumed
from .zeroing import Dropped, channels_without, zeroed

LOGITS = 2**27
"""Most bytes of the logits of one pass, in float32."""

OUTPUTS = 2**31
"""Most bytes of what layers returned that are kept to resume from."""

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


@dataclass(frozen=True)
class Measure:
    """What is measured of a candidate."""

    tokens: int
    length: int = MEASURED_LENGTH
    """Most tokens of a row."""
    objective: Objective = "loss"
    top_logits: int = 0
    """The tokens, those that are likeliest by the dense model, whose logits are compared at a position; 0: all."""

    def __str__(self) -> str:
        """As keys of stored losses have it: options that are newer than the keys are named only where they differ."""
        tokens = f"{self.tokens}" if self.length == MEASURED_LENGTH else f"{self.tokens} by {self.length}"
        top = f" of {self.top_logits}" if self.top_logits else ""
        return tokens if self.objective == "loss" else f"{tokens} {self.objective}{top}"


class CutLosses:
    """Measures candidates of an allocator: an :class:`~prunekit.registry.Evaluate`.

    ``known`` has the losses measured so far on this text, and gets the new ones. The model is as before after every
    call, also after one that fails. Raises :class:`SpecError` for counts that no site can keep and for an objective
    that does not exist, :class:`DataError` for a text without a token to predict, :class:`NonFiniteError` where the
    loss of the dense model is not finite.
    """

    def __init__(self, engine: Engine, batches: Sequence[Batch], known: MutableMapping[str, float], progress: Progress):
        self._engine, self._batches, self._known, self._progress = engine, batches, known, progress
        self._rows: dict[Measure, list[MeasuredRows]] = {}
        self._kept = 0
        """Bytes of what layers returned that are kept."""
        self.records: list[dict[str, Any]] = []
        """What the allocator has recorded."""

    def __call__(
        self,
        candidates: Sequence[Sequence[int]],
        tokens: int,
        *,
        length: int = MEASURED_LENGTH,
        objective: Objective = "loss",
        top_logits: int = 0,
    ) -> list[float]:
        if objective not in get_args(Objective):
            raise SpecError(
                f"allocator {self._engine.strategy.allocator.name} asks for the objective {objective!r:.100}; there "
                f"are {' and '.join(get_args(Objective))}; fix the plugin"
            )
        measure = Measure(tokens, length, objective, top_logits if objective == "kl" else 0)
        keys = [self._key(counts, measure) for counts in candidates]
        missing = {key: counts for key, counts in zip(keys, candidates, strict=True) if key not in self._known}
        if missing:
            with self._engine.mode_of("dense"), self._uncompiled():
                parts = self._parts(measure)
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

    def record(self, **entry: Any) -> None:
        """Have ``entry`` in the results, after what was recorded before."""
        self.records.append(entry)

    def _parts(self, measure: Measure) -> list[MeasuredRows]:
        if measure not in self._rows:
            rows = measured_rows(self._engine, self._batches, measure.tokens, measure.length)
            states = sum(each["input_ids"].numel() for each in rows) * self._engine.embeddings.weight[0].nbytes
            kept = 2 * len(self._engine.layers) * states  # by MeasuredRows
            resumes = self._kept + kept <= OUTPUTS
            self._kept += kept * resumes
            self._rows[measure] = [MeasuredRows(self._engine, each, measure, resumes) for each in rows]
        return self._rows[measure]

    def _uncompiled(self) -> AbstractContextManager:
        """Compiled code would be compiled anew for every candidate."""
        compiles = self._engine.shared.runtime.compile is not None
        return torch.compiler.set_stance("force_eager") if compiles else nullcontext()

    def _key(self, counts: Sequence[int], measure: Measure) -> str:
        """What a loss depends on, apart from model and text: the scorer, what is measured, and the sites that are
        cut; of divergences, of which a search measures many thousands, a digest of these."""
        cuts, strategy = self._engine.cuts, self._engine.strategy
        whole = len(counts) == len(cuts)
        if not whole or not all(0 <= count <= cut.site.units for cut, count in zip(cuts, counts, strict=True)):
            raise SpecError(
                f"allocator {strategy.allocator.name} asks for the loss of {list(counts)!r:.200}; a candidate is a "
                f"kept count for each of {len(cuts)} sites, between 0 and all of its units; fix the plugin"
            )
        cut_here = [
            f"{cut.site.consumer}={count or 'gone'}/{cut.site.units}"
            for cut, count in zip(cuts, counts, strict=True)
            if count < cut.site.units
        ]
        key = " ".join([strategy.scorer.identity_text, str(measure), *cut_here])
        return key if measure.objective == "loss" else f"{measure} {hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def _dropped(self, counts: Sequence[int]) -> Dropped:
        dropped: Dropped = {}
        for cut, count in zip(self._engine.cuts, counts, strict=True):
            if not count:
                dropped[cut] = None
            elif count < cut.site.units:
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
    layer; none where it does not ``resume``.

    The divergence is that of the distributions of the next token (Kullback and Leibler), KL(dense || cut). The dense
    logits are computed anew from what the last layer of the dense model returned, which takes less memory than they do.
    """

    def __init__(self, engine: Engine, rows: Batch, measure: Measure, resumes: bool):
        self._engine, self._rows, self._measure, self._resumes = engine, rows, measure, resumes
        self._dense_output: Any = None
        """What the last layer of the dense model returned, where divergences are measured."""
        ids = rows["input_ids"]
        targets = ids if "attention_mask" not in rows else ids.masked_fill(rows["attention_mask"] == 0, IGNORED)
        self._targets = targets[:, 1:]
        self.predicted = int((self._targets != IGNORED).sum())
        """Number of predicted tokens."""
        self._passed: list[Passed] = []
        dense = self._pass(tuple(cut.site.units for cut in engine.cuts), {}, [])
        self.dense_loss = dense.loss
        """Sum over the predicted tokens, in nats: the loss, also where divergences are measured."""
        self._passed = [replace(dense, loss=dense.loss if measure.objective == "loss" else 0.0)]

    def loss(self, counts: Sequence[int], dropped: Dropped) -> float:
        """The loss or divergence, summed over the predicted tokens, with zeroes in the channels ``dropped``."""
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

        last: list[Any] = []

        def keep(layer: nn.Module, args: tuple, output: Any) -> None:
            last[:] = [output]
            if self._resumes:
                outputs.append(output)

        with ExitStack() as stack:
            if known:
                stack.enter_context(resumed(self._engine, first, known[-1]))
            for layer in self._engine.layers[first:]:
                stack.callback(layer.register_forward_hook(keep).remove)
            stack.enter_context(zeroed(dropped))
            logits = self._logits()
        if self._measure.objective == "loss" or not self._passed:
            if self._measure.objective == "kl":
                (self._dense_output,) = last
            targets = self._targets.to(logits.device)
            loss = functional.cross_entropy(logits, targets[targets != IGNORED], reduction="sum").item()
        else:
            with resumed(self._engine, len(self._engine.layers), self._dense_output):
                loss = divergence(self._logits(), logits, self._measure.top_logits)
        return Passed(counts, outputs, loss)

    def _logits(self) -> Tensor:
        """Logits (N, V) float32 of the positions whose next token is predicted."""
        device = device_of(self._engine.embeddings)
        model: Callable[..., Any] = self._engine.model
        logits = model(**{key: value.to(device) for key, value in self._rows.items()}, use_cache=False).logits
        return logits[:, :-1][(self._targets != IGNORED).to(logits.device)].float()


def divergence(dense: Tensor, cut: Tensor, top: int = 0) -> float:
    """KL(dense || cut) of the distributions by logits (N, V), summed over the N positions, in nats.

    With ``top`` above 0 both are distributions over the ``top`` likeliest tokens of the dense model at a position.
    """
    if 0 < top < dense.shape[-1]:
        dense, likeliest = dense.topk(top)
        cut = cut.gather(-1, likeliest)
    return functional.kl_div(cut.log_softmax(-1), dense.log_softmax(-1), reduction="sum", log_target=True).item()


def measured_rows(engine: Engine, batches: Sequence[Batch], tokens: int, length: int) -> list[Batch]:
    """About ``tokens`` of the calibration text, at least one row: the first ``length`` of rows, spread evenly over it.

    Without their padding; rows of different lengths are padded at the end.
    """
    rows = [row for batch in batches for row in _real(batch, length) if len(row) > 1]
    if not rows:
        raise DataError(
            f"allocator {engine.strategy.allocator.name} measures the loss of the next token, and no row of the "
            "calibration text has two tokens; calibrate with longer sequences"
        )
    mean = sum(map(len, rows)) / len(rows)
    chosen = [rows[place] for place in spread(len(rows), round(tokens / mean))]
    at_once = max(1, LOGITS // (4 * engine.embeddings.num_embeddings * max(map(len, chosen))))
    return [_padded(chosen[start : start + at_once]) for start in range(0, len(chosen), at_once)]


def _real(batch: Batch, length: int) -> list[Tensor]:
    """The first ``length`` real tokens of every row."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return [ids[real.bool()][:length] for ids, real in zip(batch["input_ids"], mask, strict=True)]


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
