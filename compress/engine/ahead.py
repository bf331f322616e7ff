"""Work at the same time as the model's: deciding for a site while the one before it runs, on a CUDA stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...registry import ModelError, Site
from .site_cut import SiteCut


def following_sites(cuts: Sequence[SiteCut]) -> list[SiteCut | None]:
    """For every site, by its number, the next one that can be decided while it runs (PP, probing in parallel).

    None where the next block is not cut. The first site, or one after such a block, is decided when it is entered.
    """
    following: list[SiteCut | None] = [*cuts[1:], None][: len(cuts)]
    return [
        after if after is not None and (after.site.layer, after.site.kind) == _next_place(cut) else None
        for cut, after in zip(cuts, following, strict=True)
    ]


def _next_place(cut: SiteCut) -> tuple[int, str]:
    return (cut.site.layer, "mlp") if cut.site.kind == "attention" else (cut.site.layer + 1, "attention")


def check_ahead(model: Any, sites: Sequence[Site]) -> None:
    """Raise :class:`ModelError` for a model whose blocks cannot be probed before they are called: layers mask
    differently, while such a probe gets the mask of the layer before, or MLPs have further arguments."""
    for site in sites:
        if site.kind == "mlp" and site.residual is not None:
            raise ModelError(
                f"selector ahead: {site.entry} is called with {site.residual}, too, which is not known before "
                "its layer runs; set ahead: false"
            )
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if len(kinds) > 1:
        raise ModelError(
            f"selector ahead: the layers of this model attend in different ways ({', '.join(sorted(kinds))}), and a "
            "probe ahead borrows the attention mask of the layer before; set ahead: false"
        )


def check_attention(model: Any) -> None:
    """Raise :class:`ModelError` for a model whose attention mask is not a tensor: a probe takes a part of it."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == "flex_attention":
        raise ModelError(
            "this model has attn_implementation flex_attention, whose mask is not a tensor, and a probe takes a part "
            "of the mask; load it with attn_implementation='sdpa', or use a strategy without a probe (wanda_sp, flap)"
        )


class SideStreams:
    """One further stream for each CUDA device that is used; elsewhere the work is done at once.

    What is made on it is used on the model's stream after :meth:`join` only, and must be handed to :meth:`share`.
    """

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self.used = False
        """Whether any work was done on them so far."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def __reduce__(self) -> tuple:  # a copy of the model has streams of its own
        return SideStreams, (self._wanted,)

    def work(self, x: Tensor) -> AbstractContextManager[None]:
        """A context whose work, which reads ``x``, runs on the side stream, after all work queued so far."""
        if self._wanted and x.device.type == "cuda" and not torch.compiler.is_compiling():
            return self._on_stream(x)
        return nullcontext()

    @contextmanager
    def _on_stream(self, x: Tensor) -> Iterator[None]:
        device, self.used = x.device, True
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
        x.record_stream(stream)

    def join(self) -> None:
        """Have the model's streams wait for the side streams."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def share(self, *made: Tensor | None) -> None:
        """Keep memory of what was made on the side from being reused while the model's stream reads it."""
        for tensor in made:
            if tensor is not None and tensor.device in self._streams:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
