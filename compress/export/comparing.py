"""Compares a model that was loaded again with the one that was written: its tokens and its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...evaluators.passes import clamped, random_ids
from ...registry import ModelError
from ...registry.tensors.devices import device_of
from ..models.exported.manifest import LogitCheck
from ..models.loading import Loaded
from ..pruning.pruned import Pruned

TOLERANCE = 1e-5
"""Largest difference in float32, as a share of the largest logit: other shapes change the order of the sums."""

SAMPLE = "The 3 wise men's  path:\n\tdef f(x): return x**2  # naïve façade, 12,345.67 €, 東京, Привет\n</s> <s> end. "
"""Text that tokenizers with different rules split differently."""


def check_tokenizer(before: Any, after: Any) -> None:
    """Raise :class:`ModelError` if a tokenizer that was loaded again splits text differently."""
    if before(SAMPLE)["input_ids"] != after(SAMPLE)["input_ids"]:
        raise ModelError(
            f"the tokenizer, loaded again as {type(after).__name__}, splits text otherwise than the base model's "
            f"{type(before).__name__}, so nothing was written; nearest: --profile padded keeps the model's own class, "
            "by which transformers chooses the tokenizer"
        )


def some_tokens(loaded: Loaded, batches: list | None) -> Tensor:
    """Token ids (b, t) int64 to compare logits on: of the calibration text, or random ones."""
    if batches:
        return batches[0]["input_ids"][:2, :64]
    return random_ids(loaded.model, 2, clamped(64, loaded.model), seed=0)


def logits_of(model: Any, ids: Tensor, pruned: Pruned | None) -> Tensor:
    """Logits (b, t, V) float32 on the CPU; the histories of a dynamic pruning are reset before and after."""
    if pruned is not None:
        pruned.reset()
    with torch.no_grad():
        found = model(input_ids=ids.to(device_of(model.get_input_embeddings())), use_cache=False).logits.float().cpu()
    if pruned is not None:
        pruned.reset()
    return found


def compared(
    expected: Tensor,
    found: Tensor,
    dtype: torch.dtype,
    alike: bool,
    what: str = "the exported model, loaded again, gives other logits than the pruned one",
    then: str = "so nothing was written",
) -> LogitCheck:
    """The largest difference between two models' logits (b, t, V); raises :class:`ModelError` if it is too large.

    ``alike``: all tensors have the same shapes, so that rounding is almost the same. ``what`` and ``then`` are parts of
    the error.
    """
    largest, scale = float((expected - found).abs().max()), max(1.0, float(expected.abs().max()))
    # In half precision every layer rounds its sums, and sums of other shapes round differently.
    units = (1 if alike else 8) if dtype in (torch.float16, torch.bfloat16) else 0
    limit = max(TOLERANCE, units * torch.finfo(dtype).eps) * scale
    if not largest <= limit:
        raise ModelError(
            f"{what} (by up to {largest:.3g}, allowed are {limit:.3g}), {then}; try --set model.dtype=float32, and if "
            "that differs too, report it with the pipeline file"
        )
    tokens = expected[..., 0].numel()
    return LogitCheck(logits="equal" if largest == 0 else "close", largest_difference=largest, tokens=tokens)
