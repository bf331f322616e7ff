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
    what it reads. ``mask`` says which positions' attention mask the probe gets.
    """
    chosen = hidden.index_select(0, rows).index_select(1, positions)
    cut.close()
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
    batch = hidden.shape[0]

    def of_tokens(t: Tensor) -> Tensor:
        return (t.index_select(0, rows) if t.shape[0] == batch > 1 else t).index_select(1, positions)

    chosen = {key: value for key, value in arguments.items() if key not in ("hidden_states", CACHE_ARGUMENT)}
    if chosen.get("position_embeddings") is not None:
        chosen["position_embeddings"] = tuple(of_tokens(part) for part in chosen["position_embeddings"])
    if chosen.get("position_ids") is not None:
        chosen["position_ids"] = of_tokens(chosen["position_ids"])
    attention_mask = chosen.get("attention_mask")
    if attention_mask is not None:
        seen = positions if mask == "selected" else torch.arange(len(positions), device=positions.device)
        if attention_mask.shape[0] == batch > 1:
            attention_mask = attention_mask.index_select(0, rows)
        if attention_mask.dim() == 4:
            attention_mask = attention_mask.index_select(2, seen).index_select(3, seen)
        else:
            attention_mask = attention_mask.index_select(1, seen)
        chosen["attention_mask"] = attention_mask
    return chosen
