"""Running a site's first half on a probe, by the block's own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from .probe_reuse import Probed

if TYPE_CHECKING:
    from .site_cut import SiteCut

CACHE_ARGUMENT = "past_key_values"


@dataclass
class SiteInput:
    """What a site's block reads, or is going to read."""

    residual: Tensor
    """(B, T, D): the residual stream, before the site's norm."""
    hidden: Tensor | None
    """(B, T, D): the same normed; None where nobody has normed it yet."""
    valid: Tensor | None
    """(B, T) bool: real tokens; None where all are."""
    arguments: dict[str, Any]
    """What else an attention's forward is called with."""
    reuse: bool = False
    """Whether what the producers make of the probe is to be kept for the batch."""

    def states(self, cut: SiteCut, looks_at: Literal["residual", "hidden"]) -> Tensor:
        """(B, T, D): what a selector ranks by."""
        if looks_at == "residual":
            return self.residual
        return cut.norm.forward(self.residual) if self.hidden is None else self.hidden

    def chosen(self, cut: SiteCut, rows: Tensor, positions: Tensor) -> Tensor:
        """(b, t, D): the normed states of the probe's tokens."""
        if self.hidden is None:
            return cut.norm.forward(pick_tokens(self.residual, rows, positions))
        return pick_tokens(self.hidden, rows, positions)


@torch.no_grad()
def probe_states(cut: SiteCut, given: SiteInput, rows: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
    """What would enter the consumer for the probe's tokens, all units kept; (b, t, C).

    No attention, rotary or activation code is repeated here: the block runs its own forward with its consumer handing
    back what it reads. Positions are (t,), or (b, t) where every row has its own. ``seen``, of the same length,
    are the positions whose attention mask the probe gets.
    """
    chosen = given.chosen(cut, rows, positions)
    cut.rest()
    cut.probing = True
    cut.probed = Probed(given.hidden, rows, positions) if given.reuse and positions.dim() == 1 else None
    try:
        if cut.activation is not None:
            return cut.activation(cut.entry.forward(chosen))
        if cut.site.kind == "mlp":
            return cut.entry.forward(chosen)
        arguments = _chosen_arguments(given.arguments, given.residual, rows, positions, seen)
        return cut.entry.forward(chosen, **arguments)[0]
    finally:
        cut.probing = False


def _chosen_arguments(
    arguments: dict[str, Any], hidden: Tensor, rows: Tensor, positions: Tensor, seen: Tensor
) -> dict[str, Any]:
    """The attention's keyword arguments, those per token cut to the probe's tokens, the cache left out."""
    batch = hidden.shape[0]

    def of_tokens(t: Tensor) -> Tensor:
        return pick_tokens(t.expand(batch, *t.shape[1:]) if positions.dim() == 2 else t, rows, positions)

    chosen = {key: value for key, value in arguments.items() if key not in ("hidden_states", CACHE_ARGUMENT)}
    if chosen.get("position_embeddings") is not None:
        chosen["position_embeddings"] = tuple(of_tokens(part) for part in chosen["position_embeddings"])
    if chosen.get("position_ids") is not None:
        chosen["position_ids"] = of_tokens(chosen["position_ids"])
    attention_mask = chosen.get("attention_mask")
    if attention_mask is not None:
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
