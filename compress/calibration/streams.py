"""The residual stream that sites add to, in the dense and in the pruned model.

Letters: B rows, T positions, C channels entering the consumer, O its outputs, which are as many as the stream is wide.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import ModelError
from ..engine.batch import stream_before
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut

EQUAL = 0.02
"""Difference, as a share of what a site adds, up to which a stream counts as what was there plus that."""


class ResidualStreams:
    """Sees the residual stream before every site, for the batch that passes; a context manager.

    A layer that passes raises :class:`ModelError` where the output of a site is not added to the stream as it is: where
    a norm or a factor follows, both sites read the same stream, or routed experts add to it. A lag cannot be
    compensated there.
    """

    def __init__(self, engine: Engine):
        self._engine, self._stack = engine, ExitStack()
        self._before: dict[SiteCut, Tensor] = {}
        self._added: dict[SiteCut, Tensor] = {}
        self._right: set[int] = set()
        """Layers that add as they should."""

    def __enter__(self) -> ResidualStreams:
        for cut in self._engine.cuts:
            norm, consumer = cut.binding.norm, cut.binding.consumer
            reads = cut.binding.entry if norm is None else norm
            self._stack.callback(reads.register_forward_pre_hook(partial(self._reads, cut), with_kwargs=True).remove)
            self._stack.callback(consumer.register_forward_hook(partial(self._adds, cut)).remove)
        for layer in {cut.site.layer for cut in self._engine.cuts}:
            module = self._engine.layers[layer]
            self._stack.callback(module.register_forward_hook(partial(self._passed, layer)).remove)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def beside(self, cut: SiteCut, x: Tensor) -> Tensor:
        """What enters the consumer (B, T, C), and the stream before the site: (B, T, C + O)."""
        return torch.cat([x, self._like(x, self._before[cut])], -1)

    def lag(self, cut: SiteCut, dense: Tensor) -> Tensor:
        """The dense model's (B, T, C + O) of :meth:`beside`, its stream less that of the model that passes now."""
        x, stream = dense.tensor_split([cut.site.channels], -1)
        return torch.cat([x, stream - self._like(x, self._before[cut])], -1)

    def _like(self, x: Tensor, stream: Tensor) -> Tensor:
        return stream.reshape(*x.shape[:2], -1).to(x.device)

    def _reads(self, cut: SiteCut, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._before[cut] = stream_before(cut.site, module, args, kwargs).detach()

    def _adds(self, cut: SiteCut, consumer: nn.Module, args: tuple, output: Tensor) -> None:
        if cut.site.layer not in self._right:
            self._added[cut] = output.detach().clone()  # a block may add to it in place

    def _passed(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        """The stream before every next site, and what the layer returns, is what was there and what was added."""
        if layer in self._right:
            return
        cuts = [cut for cut in self._engine.cuts if cut.site.layer == layer]
        streams = [self._before[cut] for cut in cuts] + [output[0] if isinstance(output, tuple) else output]
        for cut, before, after in zip(cuts, streams, streams[1:], strict=False):
            added = self._added.pop(cut).reshape(before.shape)
            difference = after.detach().reshape(before.shape) - (before + added)
            if not float(difference.float().norm()) <= EQUAL * float(added.float().norm()):
                raise ModelError(
                    f"{cut.site.label}: what {cut.site.consumer} returns is not added to the residual stream as it is "
                    "(a norm or a factor follows, both sites read the same stream, or another part of the layer adds "
                    "to it), so the stream of the dense model cannot be fitted; nothing was pruned. Use target: "
                    "dense_outputs"
                )
        self._right.add(layer)
