"""Running a site's first half on a probe, by the block's own forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cut import SiteCut

CACHE_ARGUMENT = "past_key_values"


@torch.no_grad()
def probe_states(
    cut: SiteCut,
    hidden: Tensor,
    rows: Tensor,
    positions: Tensor,
    arguments: dict[str, Any],
    mask: Literal["selected", "first"],
) -> Tensor:
    """What would enter the consumer for the probe's tokens, all units kept.

    ``hidden`` (B, T, D) is the normed input of the block; returns (b, t, C). No attention, rotary or
    activation code is repeated here: the block runs its own forward with its consumer handing back
    what it reads. Positions are (t,), or (b, t) where every row has its own. ``mask`` says which positions'
    attention mask the probe gets.
    """
    chosen = pick_tokens(hidden, rows, positions)
    if cut.fixed is None:
        cut.close()
    else:
        cut.rest()
    cut.probing = True
    try:
        if cut.activation is not None:
            return cut.activation(cut.entry.forward(chosen))
        if cut.site.kind == "mlp":
            return cut.entry.forward(chosen)
        return cut.entry.forward(chosen, **_chosen_arguments(arguments, hidden, rows, positions, mask))[0]
    finally:
        cut.probing = False


def _chosen_arguments(
    arguments: dict[str, Any], hidden: Tensor, rows: Tensor, positions: Tensor, mask: Literal["selected", "first"]
) -> dict[str, Any]:
    """The attention's keyword arguments, those per token cut to the probe's tokens, the cache left out."""
    batch, length = hidden.shape[0], positions.shape[-1]

    def of_tokens(t: Tensor) -> Tensor:
        return pick_tokens(t.expand(batch, *t.shape[1:]) if positions.dim() == 2 else t, rows, positions)

    chosen = {key: value for key, value in arguments.items() if key not in ("hidden_states", CACHE_ARGUMENT)}
    if chosen.get("position_embeddings") is not None:
        chosen["position_embeddings"] = tuple(of_tokens(part) for part in chosen["position_embeddings"])
    if chosen.get("position_ids") is not None:
        chosen["position_ids"] = of_tokens(chosen["position_ids"])
    attention_mask = chosen.get("attention_mask")
    if attention_mask is not None:
        seen = positions if mask == "selected" else torch.arange(length, device=positions.device)
        chosen["attention_mask"] = _chosen_mask(attention_mask, batch, rows, seen)
    return chosen


def _chosen_mask(attention_mask: Tensor, batch: int, rows: Tensor, seen: Tensor) -> Tensor:
    """An attention mask (B or 1, 1, T, T) or (B or 1, T) of the probe's tokens alone; seen (t,) or (b, t)."""
    if seen.dim() == 2:
        attention_mask = attention_mask.expand(batch, *attention_mask.shape[1:])
    if attention_mask.dim() == 2:
        return pick_tokens(attention_mask, rows, seen)
    if attention_mask.shape[0] == batch > 1:
        attention_mask = attention_mask.index_select(0, rows)
    if seen.dim() == 1:
        return attention_mask.index_select(2, seen).index_select(3, seen)
    each = torch.arange(len(rows), device=rows.device)[:, None, None]
    return attention_mask[each, :, seen[:, :, None], seen[:, None, :]].permute(0, 3, 1, 2)


def pick_tokens(t: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """The tokens of ``rows`` (b,) at ``positions`` (t,), or (b, t) row by row; (B or 1, T, ...) -> (b, t, ...)."""
    t = t.index_select(0, rows) if t.shape[0] > 1 else t
    if positions.dim() == 1:
        return t.index_select(1, positions)
    return t[torch.arange(len(rows), device=rows.device)[:, None], positions]
