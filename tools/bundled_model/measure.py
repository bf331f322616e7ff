"""Perplexity of a causal language model on one text, in plain windows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

WINDOW = 512


def text_windows(ids: list[int], context: int = WINDOW) -> Iterator[list[int]]:
    """Consecutive windows without overlap, the last one shorter; a window of one token scores nothing."""
    for start in range(0, len(ids), context):
        if len(ids) - start > 1:
            yield ids[start : start + context]


@torch.inference_mode()
def mean_loss(model, ids: list[int], context: int = WINDOW) -> tuple[float, int]:
    """Mean next-token loss in nats and how many tokens it covers; the first token of a window is not scored."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for window in text_windows(ids, context):
        batch = torch.tensor([window], device=device)
        logits = model(input_ids=batch, use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="sum").item()
        count += len(window) - 1
    return total / count, count


def perplexity(model, ids: list[int], context: int = WINDOW) -> float:
    """The exponential of `mean_loss`."""
    return math.exp(mean_loss(model, ids, context)[0])
