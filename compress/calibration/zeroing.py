"""Cuts by zeroes where consumers read, so that no weight changes and every architecture works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ...registry import complement
from ...registry.tensors.devices import device_of
from ..engine.site_cut import SiteCut

Dropped = dict[SiteCut, "Tensor | None"]
"""Channels (C,) bool that are zero, by site; None: the site keeps nothing, and its consumer's bias goes too."""


def channels_without(cut: SiteCut, kept: Tensor) -> Tensor:
    """The channels (C,) bool of the units that are not kept; kept (k,) int64 ascending."""
    columns = cut.site.columns(complement(kept, cut.site.units))
    return torch.zeros(cut.site.channels, dtype=torch.bool, device=kept.device).index_fill_(0, columns, True)


@contextmanager
def zeroed(dropped: Dropped) -> Iterator[None]:
    """Within it these channels are zero where consumers read them: the model computes as if it were cut."""
    with ExitStack() as stack:
        for cut, channels in dropped.items():
            consumer = cut.binding.consumer
            if channels is None:
                stack.callback(consumer.register_forward_hook(_nothing).remove)
            else:
                hook = partial(_zero, channels.to(device_of(consumer)))
                stack.callback(consumer.register_forward_pre_hook(hook).remove)
        yield


def _zero(channels: Tensor, consumer: nn.Module, args: tuple) -> tuple:
    return args[0].masked_fill(channels.to(args[0].device), 0), *args[1:]


def _nothing(consumer: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return torch.zeros_like(output)
