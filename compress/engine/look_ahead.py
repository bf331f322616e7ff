"""Deciding ahead: which site is decided for while which other one runs (PP, probing in parallel)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from ...registry import ModelError
from .site_cut import SiteCut


def following_sites(cuts: Sequence[SiteCut]) -> dict[SiteCut, SiteCut]:
    """For every site the one that comes right after it in the model, if that is cut: it can be decided for meanwhile.

    A site whose predecessor cannot be cut (the first, or one behind a skipped layer) is decided for in its place.
    """
    return {cut: following for cut, following in pairwise(cuts) if _next(cut) == _place(following)}


def _place(cut: SiteCut) -> tuple[int, str]:
    return cut.site.layer, cut.site.kind


def _next(cut: SiteCut) -> tuple[int, str]:
    return (cut.site.layer, "mlp") if cut.site.kind == "attention" else (cut.site.layer + 1, "attention")


def check_same_attention(model: Any) -> None:
    """Raise :class:`ModelError` for a model whose layers mask differently: a probe ahead borrows the mask of the layer
    before."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ModelError(
            f"selector ahead: the layers of this model attend in different ways ({', '.join(sorted(kinds))}), and a "
            "probe ahead borrows the attention mask of the layer before; set ahead: false"
        )
