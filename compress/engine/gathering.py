"""Copying kept rows and columns of weights together: into memory that is used again, and never across the grain."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...registry import Selection
from ...registry.tensors.devices import is_offloaded
from .runtime import Runtime

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector registers."""

Key = tuple[str, str]
"""The kind of site, and which of its layers: all sites of a kind share one piece of memory for each layer."""


class Gatherer:
    """Gathers for all sites of a model; what it returns is valid until the same key is gathered for again.

    Without a key it is in memory of its own, valid for as long as somebody holds it.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self._buffers: dict[tuple[Key, torch.device, torch.dtype], Tensor] = {}

    def rows(self, linear: nn.Linear, chosen: Selection, key: Key | None) -> Tensor:
        """The chosen rows (r,) of the weight (R, D) -> (r, D)."""
        return self._gathered(linear, chosen.source, chosen.dim, chosen.index, key)

    def columns(self, linear: nn.Linear, chosen: Selection, key: Key | None, once: bool) -> Tensor:
        """The chosen columns (c,) of the weight (O, C) -> (O, c), by rows if cut ``once``, else by columns.

        One that is offloaded is stored by rows and its columns are gathered across the grain, but laid down as those
        of any other: products then agree to the last bit.
        """
        if once or not self.runtime.column_major:
            return self._gathered(linear, chosen.source, 1, chosen.index, key)
        return self._gathered(linear, chosen.source.t(), 0, chosen.index, key).t()

    def _gathered(self, linear: nn.Linear, weight: Tensor, dim: int, index: Tensor, key: Key | None) -> Tensor:
        shares = key is not None and self.runtime.shared_buffers and not is_offloaded(linear)
        if not shares or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return weight.index_select(dim, index)
        shape = (len(index), weight.shape[1]) if dim == 0 else (weight.shape[0], len(index))
        return torch.index_select(weight, dim, index, out=self._buffer(key, weight, math.prod(shape)).view(shape))

    def _buffer(self, key: Key, weight: Tensor, numbers: int) -> Tensor:
        """Memory for ``numbers`` numbers, the piece that the key had before if it is large enough."""
        place = key, weight.device, weight.dtype
        buffer = self._buffers.get(place)
        if buffer is None or buffer.numel() < numbers:
            with torch.inference_mode(False):  # else passes outside of it could not write to it
                buffer = self._buffers[place] = torch.empty(numbers, dtype=weight.dtype, device=weight.device)
        return buffer[:numbers]

    def release(self, kind: str | None = None) -> None:
        """Give memory back: that of one kind of site, or all of it."""
        for place in [place for place in self._buffers if kind in (None, place[0][0])]:
            del self._buffers[place]

    @property
    def buffers(self) -> list[Tensor]:
        """The memory that is held."""
        return list(self._buffers.values())


def is_column_major(weight: Tensor) -> bool:
    """Whether columns, not rows, lie in one piece."""
    return not weight.is_contiguous() and weight.t().is_contiguous()


def _is_part(weight: Tensor) -> bool:
    """Whether the weight's memory holds more than the weight, beyond what an aligned beginning takes."""
    return weight.untyped_storage().nbytes() > weight.numel() * weight.element_size() + ALIGNMENT


@torch.no_grad()
def store_column_major(linear: nn.Linear) -> Callable[[], None] | None:
    """Store the weight (O, C) column by column, the parameter and its values unchanged; gives what undoes it.

    None, and nothing done, for weights that are elsewhere (offloaded), that torch's inference mode owns, that other
    processes or other tensors see as part of one piece of memory, or that are stored in any way but row by row. A
    tensor of the weight's own size that lies in its memory cannot be told, and keeps that memory.
    """
    weight = linear.weight
    if weight.is_meta or is_offloaded(linear) or weight.is_inference() or type(weight.data) is not Tensor:
        return None
    if (weight.is_shared() and weight.device.type == "cpu") or _is_part(weight):
        return None
    if not weight.is_contiguous():
        return None
    misaligned = weight.data_ptr() % ALIGNMENT

    @torch.no_grad()
    def store_row_major() -> None:
        weight.data = _placed(weight.data, misaligned)

    weight.data = _placed(weight.data.t(), 0).t()
    return store_row_major


def _placed(values: Tensor, misaligned: int) -> Tensor:
    """A contiguous copy; on a CPU so many bytes beyond a multiple of :data:`ALIGNMENT`, because the last bit of a
    product depends on where its factors lie."""
    if values.device.type != "cpu" or misaligned % values.element_size():
        return values.contiguous() if not values.is_contiguous() else values.clone()
    room = ALIGNMENT // values.element_size()
    memory = torch.empty(values.numel() + room, dtype=values.dtype)
    start = (misaligned - memory.data_ptr()) % ALIGNMENT // values.element_size()
    return memory[start : start + values.numel()].view(values.shape).copy_(values)
