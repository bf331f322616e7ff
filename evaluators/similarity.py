"""How like the dense model's representations the pruned model's still are, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import Evaluator, Measurement, NonFiniteError, Subject, TextSource, hookimpl
from ..registry.tensors.windows import digest
from .inputs import clamped, setting, text_batches
from .representations import Pair, linear_cka, svcca

ROOM = 1 << 32
"""Most bytes of running sums that are held at once; deeper models take several passes over the text."""

NOTEWORTHY = 0.1
"""Directions per token above which SVCCA is noticeably high for unrelated representations too."""


class Similarity(Evaluator):
    """Linear CKA and SVCCA of every layer's output, pruned against dense, on the same tokens.

    Compared is the residual stream after each decoder layer, as ``output_hidden_states`` gives it; the last
    layer's is what the output layer reads, after the final norm. Values are means over layers (1: the same up
    to what each measure is blind to), details the layers.

    Sums for covariances are float64: 24 bytes per layer and squared hidden size, at most 4 GB at once; models
    that need more are run once for every group of layers that fits. Besides them a batch's hidden states are
    held, of all layers and both models. Running a batch moves the history of strategies that probe; every pass
    starts from the calibrated state.
    """

    paired: ClassVar[bool] = True
    paper: ClassVar[str] = "CKA: ICML 2019, arXiv 1905.00414; SVCCA: NeurIPS 2017, arXiv 1706.05806"

    name: Literal["similarity"] = "similarity"
    text: TextSource = Field(default=TextSource(bundled="reference-evaluation"), description="what to compare on")
    batch_size: int = Field(
        default=20, ge=1, description="sequences of a batch; strategies that probe decide per batch"
    )
    length: int = Field(default=256, ge=1, description="tokens of each sequence, at most the model's context")
    batches: int = Field(
        default=2, ge=1, description="batches to run; SVCCA wants many more tokens than hidden dimensions"
    )
    variance: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="SVCCA compares the directions that hold this share of either side's variance",
    )

    def evaluate(self, subject: Subject) -> Measurement:
        """Compare; raises DataError (text too short for the batches) and NonFiniteError (NaN or infinity)."""
        length = clamped(self.length, subject.model)
        batches = text_batches(subject, self.text, self.batches, self.batch_size, length)
        tokens = self.batches * self.batch_size * length
        details: dict[str, list] = {key: [] for key in ("cka", "svcca", "dense_directions", "pruned_directions")}
        for pair in self._pairs(subject, batches):
            products = pair.products()
            found = svcca(products, self.variance)
            known = not crowded(found.directions, tokens)
            layer = (linear_cka(products), found.value if known else None, *found.directions)
            for values, value in zip(details.values(), layer, strict=True):
                values.append(value)
        protocol = {
            "text": self.text.label,
            "batch_size": self.batch_size,
            "length": length,
            "batches": self.batches,
            "tokens": tokens,
            "variance": self.variance,
            "compared": "outputs of all decoder layers, the last after the final norm; float64 covariances",
            "ids_sha256": digest(batches),
            **setting(subject.model),
        }
        values = {key: mean(details[key]) for key in ("cka", "svcca")}
        return Measurement(values, protocol, notes_on(details, tokens), details)

    def _pairs(self, subject: Subject, batches: list[Tensor]) -> Iterator[Pair]:
        """What every layer showed, dense (x) beside pruned (y), layer by layer."""
        config = subject.model.config.get_text_config()
        layers, together = config.num_hidden_layers, max(1, ROOM // (24 * config.hidden_size**2))
        groups = [range(first, min(first + together, layers)) for first in range(0, layers, together)]
        steps = ((group, number, ids) for group in groups for number, ids in enumerate(batches))
        pairs: list[Pair] = []
        for group, number, ids in subject.progress(steps, "similarity", len(groups) * len(batches)):
            if not number:
                subject.reset()
                pairs = [Pair() for _ in group]
            pruned = outputs(subject.model, ids)
            with subject.dense():
                dense = outputs(subject.model, ids)
            for layer, pair in zip(group, pairs, strict=True):
                pair.add(dense[layer].flatten(0, 1), pruned[layer].flatten(0, 1))
                for side, finite in zip(("dense", "pruned"), pair.finite(), strict=True):
                    if not finite:
                        raise NonFiniteError(
                            f"similarity on {self.text.label}: the {side} model's output of layer {layer} has NaN or "
                            f"infinity in batch {number} in {setting(subject.model)['dtype']}; try model.dtype: "
                            "float32 (or bfloat16 for float16)"
                        )
            if number == len(batches) - 1:
                while pairs:  # one by one, so that what was compared is let go
                    yield pairs.pop(0)


def outputs(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """The residual stream after every decoder layer; ids (B, T) -> L of (B, T, D)."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:]


def mean(values: list[float | None]) -> float | None:
    """The mean of what was measured; None where nothing was."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def crowded(directions: tuple[int, int], tokens: int) -> bool:
    """Whether two sides with so many directions must share some: centred tokens span one dimension less."""
    return sum(directions) > tokens - 1


def notes_on(details: dict[str, list], tokens: int) -> list[str]:
    """What to know of an SVCCA of few tokens, which is high whatever is compared."""
    most = max(map(max, details["dense_directions"], details["pruned_directions"]), default=0)
    directions = zip(details["dense_directions"], details["pruned_directions"], strict=True)
    left_out = sum(crowded(layer, tokens) for layer in directions)
    remedy = "take more batches, or a lower variance"
    notes = []
    if left_out:
        notes.append(
            f"SVCCA of {left_out} layers is left out: both sides' directions do not fit in the {tokens - 1} dimensions "
            f"that {tokens} tokens span, so some would agree whatever is compared; {remedy}"
        )
    if left_out < len(details["svcca"]) and most > NOTEWORTHY * tokens:
        chance = math.sqrt(min(1.0, most / (tokens - 1)))
        notes.append(
            f"SVCCA compares up to {most} directions on {tokens} tokens, where unrelated representations would reach "
            f"about {chance:.2f}; {remedy}"
        )
    return notes


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Similarity]
