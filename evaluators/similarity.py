"""Similarity of the pruned model's representations with the dense model's, layer by layer: linear CKA and SVCCA.

Letters: N tokens, P and Q dimensions of two representations of them. Covariances are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ..registry import Evaluator, Measurement, NonFiniteError, Subject, hookimpl
from ..registry.tensors.windows import digest
from .passes import TextBatches, setting

ROOM = 1 << 32
"""Most bytes of running sums in memory at once; deeper models take several passes over the text."""

RANK = 1e-10
"""Directions with less than this share of the largest variance are noise of the model's float32."""

NOTEWORTHY = 0.1
"""Directions per token above which SVCCA is high even for unrelated representations."""


class Similarity(TextBatches):
    """Linear CKA and SVCCA of every layer's output, pruned against dense, on the same tokens.

    The compared outputs are those of ``output_hidden_states``: the residual stream after each decoder layer, for the
    last layer after the final norm. Values are means over layers; 1 means the same up to the transformations that the
    measure ignores. Details have a value per layer.

    Sums for covariances are float64: 24 bytes per layer and squared hidden size, at most 4 GB at once; a model that
    needs more is run once for every group of layers that fits. The hidden states of one batch, of all layers and both
    models, are in memory too. A batch changes the history of strategies that probe; every pass starts from the
    calibrated state.
    """

    paired: ClassVar[bool] = True
    paper: ClassVar[str] = "CKA: ICML 2019, arXiv 1905.00414; SVCCA: NeurIPS 2017, arXiv 1706.05806"

    name: Literal["similarity"] = "similarity"
    batches: int = Field(
        default=2, ge=1, description="batches to run; SVCCA needs many more tokens than hidden dimensions"
    )
    variance: float = Field(
        default=0.99,
        gt=0,
        le=1,
        description="SVCCA compares the directions with this share of the variance, of each model",
    )

    def evaluate(self, subject: Subject) -> Measurement:
        """Compare the layers' outputs of the pruned and the dense model.

        Raises DataError (text too short for the batches) and NonFiniteError (NaN or infinity)."""
        batches, about = self.read_batches(subject)
        tokens = sum(ids.numel() for ids in batches)
        details: dict[str, list] = {key: [] for key in ("cka", "svcca", "dense_directions", "pruned_directions")}
        for pair in self._pairs(subject, batches):
            products = pair.products()
            found = svcca(products, self.variance)
            known = not crowded(found.directions, tokens)
            layer = (linear_cka(products), found.value if known else None, *found.directions)
            for column, value in zip(details.values(), layer, strict=True):
                column.append(value)
        protocol = {
            **about,
            "tokens": tokens,
            "variance": self.variance,
            "compared": "outputs of all decoder layers, the last after the final norm; float64 covariances",
            "ids_sha256": digest(batches),
            **setting(subject.model),
        }
        values = {key: mean(details[key]) for key in ("cka", "svcca")}
        return Measurement(values, protocol, notes_on(details, tokens), details)

    def _pairs(self, subject: Subject, batches: list[Tensor]) -> Iterator[Pair]:
        """The running sums of every layer, dense (x) with pruned (y), in the order of the layers."""
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
                while pairs:  # one by one, so that each is freed after its comparison
                    yield pairs.pop(0)


def outputs(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """The residual stream after every decoder layer; ids (B, T) -> L of (B, T, D)."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:]


def mean(values: list[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def crowded(directions: tuple[int, int], tokens: int) -> bool:
    """Whether both sides must share directions: centred tokens span one dimension less than their number."""
    return sum(directions) > tokens - 1


def notes_on(details: dict[str, list], tokens: int) -> list[str]:
    """Notes on an SVCCA of few tokens, which is high for any two representations."""
    most = max(map(max, details["dense_directions"], details["pruned_directions"]), default=0)
    directions = zip(details["dense_directions"], details["pruned_directions"], strict=True)
    left_out = sum(crowded(layer, tokens) for layer in directions)
    remedy = "take more batches, or a lower variance"
    notes = []
    if left_out:
        notes.append(
            f"SVCCA of {left_out} layers is left out: both sides' directions do not fit in the {tokens - 1} dimensions "
            f"that {tokens} tokens span, so some agree for any representations; {remedy}"
        )
    if left_out < len(details["svcca"]) and most > NOTEWORTHY * tokens:
        chance = math.sqrt(min(1.0, most / (tokens - 1)))
        notes.append(
            f"SVCCA compares up to {most} directions on {tokens} tokens, where unrelated representations would reach "
            f"about {chance:.2f}; {remedy}"
        )
    return notes


class Products(NamedTuple):
    """Centred cross products of X (N, P) and Y (N, Q): X'X (P, P), Y'Y (Q, Q) and X'Y (P, Q)."""

    xx: Tensor
    yy: Tensor
    xy: Tensor


class Svcca(NamedTuple):
    """The mean canonical correlation, None if a side is constant, and the number of directions of each side."""

    value: float | None
    directions: tuple[int, int]


@dataclass
class Pair:
    """Running sums over the tokens of two representations; memory does not grow with their number.

    Each side is shifted by the mean of its first tokens, so that a large mean loses no digits.
    """

    tokens: int = 0
    _shift: list[Tensor] = field(default_factory=list)
    _sums: list[Tensor] = field(default_factory=list)
    _products: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add n tokens of both representations; (n, P) and (n, Q) of any floating dtype."""
        x, y = double(x), double(y)
        if not self.tokens:
            self._shift = [x.mean(0), y.mean(0)]
            self._sums = [torch.zeros_like(mean) for mean in self._shift]
            shapes = ((x, x), (y, y), (x, y))
            self._products = [x.new_zeros(a.shape[1], b.shape[1]) for a, b in shapes]
        x, y = x - self._shift[0], y - self._shift[1]
        for total, side in zip(self._sums, (x, y), strict=True):
            total += side.sum(0)
        for total, (a, b) in zip(self._products, ((x, x), (y, y), (x, y)), strict=True):
            total.addmm_(a.T, b)
        self.tokens += x.shape[0]

    def finite(self) -> tuple[bool, bool]:
        """Whether all values added so far are finite, of x and of y."""
        x, y = (bool(torch.isfinite(total).all()) for total in self._sums)
        return x, y

    def products(self) -> Products:
        """The centred products of all tokens added."""
        sums = {0: (0, 0), 1: (1, 1), 2: (0, 1)}
        centred = []
        for index, total in enumerate(self._products):
            a, b = (self._sums[side] for side in sums[index])
            centred.append(total - torch.outer(a, b) / self.tokens)
        return Products(*centred)


def double(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU if its device has no float64."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def linear_cka(products: Products) -> float | None:
    """Linear centred kernel alignment, ||X'Y||² / (||X'X|| ||Y'Y||), 0 to 1; None if a side is constant.

    Kornblith et al., ICML 2019, arXiv 1905.00414. Invariant to rotations and to the scale of either side.
    """
    scale = products.xx.norm() * products.yy.norm()
    return (products.xy.norm().square() / scale).item() if scale > 0 else None


def svcca(products: Products, variance: float) -> Svcca:
    """Mean canonical correlation, 0 to 1, of the directions with the share ``variance`` of each side's variance.

    Raghu et al., NeurIPS 2017, arXiv 1706.05806; the mean is over the smaller number of directions. Invariant
    to rotations and scale, and with ``variance`` 1 to every invertible linear map of either side.
    """
    left, right = whitening(products.xx, variance), whitening(products.yy, variance)
    directions = left.shape[1], right.shape[1]
    if not min(directions):
        return Svcca(None, directions)
    correlations = torch.linalg.svdvals(left.T @ products.xy @ right).clamp(max=1)
    return Svcca(correlations.mean().item(), directions)


def whitening(square: Tensor, variance: float) -> Tensor:
    """Maps to the strongest directions with a share ``variance`` of the variance, normed to 1; (P, P) -> (P, k)."""
    values, vectors = torch.linalg.eigh(square)
    values, vectors = values.flip(0), vectors.flip(1)
    real = values > RANK * values[0].clamp(min=0)
    before = values.clamp(min=0).cumsum(0) - values.clamp(min=0)
    kept = real & (before < variance * values.clamp(min=0).sum() * (1 - RANK))
    return vectors[:, kept] / values[kept].sqrt()


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Similarity]
