"""The check of mask appliers, on made-up weights; :mod:`prunekit.registry.checks` runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..roles.parts import MaskApplier, Selection
from .parts import draw, expect, expect_tensor, expect_unchanged


def check_application(applier: MaskApplier) -> None:
    """Producers and consumer cut alike: together they compute what the kept channels contribute."""
    weight, bias, consumer, x = draw(24, 16), draw(24, seed=1), draw(20, 24, seed=2), draw(16, seed=3)
    kept = torch.tensor([0, 3, 4, 11, 23])
    expected = consumer[:, kept] @ (weight @ x + bias)[kept]
    rows, row_bias = (_copied(part) for part in applier.producer(weight, bias, kept))
    columns = _copied(applier.consumer(consumer, kept))
    width = len(kept) if applier.resizes else 24
    rows = expect_tensor(rows, applier, "the producer's weight", (width, 16))
    row_bias = expect_tensor(row_bias, applier, "the producer's bias", (width,))
    columns = expect_tensor(columns, applier, "the consumer's weight", (20, width))
    same = torch.allclose(columns @ (rows @ x + row_bias), expected, rtol=1e-4, atol=1e-5)
    expect(same, applier, "computes something else than the kept channels' contribution")
    expect(applier.producer(weight, None, kept)[1] is None, applier, "makes a bias where the producer has none")
    expect_unchanged(applier, "weight", draw(24, 16), weight)
    expect_unchanged(applier, "weight", draw(20, 24, seed=2), consumer)


def _copied(part: Tensor | Selection | None) -> Tensor | None:
    return part.copied() if isinstance(part, Selection) else part
