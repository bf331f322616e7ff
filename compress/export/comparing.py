"""Whether a model that was loaded again is the one that was written: its logits, token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...evaluators.passes import clamped, random_ids
from ...registry import ModelError
from ...registry.tensors.devices import device_of
from ..models.loading import Loaded
from ..pruning.pruned import Pruned

TOLERANCE = 1e-5
"""Of the largest logit, in float32: other shapes add the same numbers up in another order."""


SAMPLE = "The 3 wise men's  path:\n\tdef f(x): return x**2  # naïve façade, 12,345.67 €, 東京, Привет\n</s> <s> end. "
"""Text on which tokenizers differ where they differ at all."""


def check_tokenizer(before: Any, after: Any) -> None:
    """Raise :class:`ModelError` where a tokenizer, loaded again, reads text differently."""
    if before(SAMPLE)["input_ids"] != after(SAMPLE)["input_ids"]:
        raise ModelError(
            f"the tokenizer, loaded again as {type(after).__name__}, splits text otherwise than the base model's "
            f"{type(before).__name__}, so nothing was written; nearest: --profile padded keeps the model's own class, "
            "by which transformers chooses the tokenizer"
        )


def some_tokens(loaded: Loaded, batches: list | None) -> Tensor:
    """Tokens (b, t) int64 to compare logits on: of the calibration text, or random ones."""
    if batches:
        return batches[0]["input_ids"][:2, :64]
    return random_ids(loaded.model, 2, clamped(64, loaded.model), seed=0)


def logits_of(model: Any, ids: Tensor, pruned: Pruned | None) -> Tensor:
    """Logits (b, t, V) float32 on the CPU; histories of a dynamic pruning are as calibrated before and after."""
    if pruned is not None:
        pruned.reset()
    with torch.no_grad():
        found = model(input_ids=ids.to(device_of(model.get_input_embeddings())), use_cache=False).logits.float().cpu()
    if pruned is not None:
        pruned.reset()
    return found


def compared(expected: Tensor, found: Tensor, dtype: torch.dtype, alike: bool) -> dict[str, Any]:
    """The largest difference of two models' logits; raises :class:`ModelError` where they are not the same model.

    ``alike`` says that all shapes are the same, so that hardly anything may differ.
    """
    largest, scale = float((expected - found).abs().max()), max(1.0, float(expected.abs().max()))
    # In half precision every layer rounds its sums, and sums of other shapes round otherwise: a few units add up.
    units = (1 if alike else 8) if dtype in (torch.float16, torch.bfloat16) else 0
    limit = max(TOLERANCE, units * torch.finfo(dtype).eps) * scale
    if not largest <= limit:
        raise ModelError(
            f"the exported model, loaded again, gives other logits than the pruned one (by up to {largest:.3g}, "
            f"allowed are {limit:.3g}), so nothing was written; try --set model.dtype=float32, and if that differs "
            "too, report it with the pipeline file"
        )
    state = "equal" if largest == 0 else "close"
    return {"logits": state, "largest_difference": largest, "tokens": expected[..., 0].numel()}
