"""Copies kept rows and columns of weights, into reused memory and in the weights' own memory layout."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ...registry import MaskApplier, Selection
from ...registry.tensors.devices import is_offloaded
from ...registry.tensors.linears import is_transposed
from .runtime import Runtime

ALIGNMENT = 64
"""Bytes of a cache line, and of the widest vector registers."""

MISALIGNED = "prunekit_misaligned"
"""Attribute of a layer that is stored by columns: where its memory lay before, see :func:`_placed`."""

Place = tuple[str, str]
"""The kind of site, and the path of one of its layers."""


class Gatherer:
    """Copies selections for all sites of a model.

    All sites of a kind share one piece of memory for each of their layers (q_proj, o_proj ...): a copy for a place is
    valid until the next one for the same layer of that kind. A copy for no place has memory of its own.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self._buffers: dict[tuple[str, str, torch.device, torch.dtype], Tensor] = {}

    def copy(self, chosen: Selection, linear: nn.Linear, place: Place | None, once: bool) -> Tensor:
        """The selected rows of ``linear`` (r, D), or its columns (O, c).

        Unless cut ``once``, columns are stored column by column, as the weights are, so that whole columns are copied.
        Those of an offloaded weight, stored by rows, get the same layout: products then agree to the last
        bit.
        """
        source, dim, index = chosen.source, chosen.dim, chosen.index
        by_columns = dim == 1 and not once and self.runtime.column_major
        if by_columns:
            source, dim = source.t(), 0
        kind, path = place or ("", "")
        shares = kind and self.runtime.shared_buffers and not torch.is_grad_enabled()
        if not shares or torch.compiler.is_compiling() or (hasattr(linear, "_hf_hook") and is_offloaded(linear)):
            made = source.index_select(dim, index)
        else:
            shape = (len(index), source.shape[1]) if dim == 0 else (source.shape[0], len(index))
            key, numbers = (kind, path.rpartition(".")[2], source.device, source.dtype), math.prod(shape)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.numel() < numbers:
                with torch.inference_mode(False):  # else passes outside of it could not write to it
                    buffer = self._buffers[key] = torch.empty(numbers, dtype=source.dtype, device=source.device)
            made = torch.index_select(source, dim, index, out=buffer[:numbers].view(shape))
        return made.t() if by_columns else made

    def release(self, kind: str | None = None) -> None:
        """Free the memory of one kind of site, or all of it."""
        for key in [key for key in self._buffers if kind in (None, key[0])]:
            del self._buffers[key]

    @property
    def buffers(self) -> list[Tensor]:
        """The memory that is held."""
        return list(self._buffers.values())


def selects(applier: MaskApplier) -> bool:
    """Whether an applier returns plain selections, which the engine may copy in any way, or read in place."""
    weight, bias, index = torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    parts = (*applier.producer(weight, bias, index), applier.consumer(weight, index))
    return all(
        isinstance(part, Selection) and part.source is source and part.index is index
        for part, source in zip(parts, (weight, bias, weight), strict=True)
    )


@torch.no_grad()
def store_column_major(linear: nn.Linear) -> bool:
    """Store the weight (O, C) by columns, the parameter and its values unchanged, until :func:`store_row_major`.

    False, and nothing is done, for weights that are offloaded, made in torch's inference mode, shared with other
    processes, part of a larger piece of memory, or not stored row by row, as in a ``Conv1D``. Another tensor of the
    weight's own size in the same memory is not noticed, and keeps that memory.
    """
    weight = linear.weight
    if weight.is_meta or is_offloaded(linear) or weight.is_inference() or type(weight.data) is not Tensor:
        return False
    is_part = weight.untyped_storage().nbytes() > weight.numel() * weight.element_size() + ALIGNMENT
    by_rows = weight.is_contiguous() and not is_transposed(linear)
    if (weight.is_shared() and weight.device.type == "cpu") or is_part or not by_rows:
        return False
    misaligned = weight.data_ptr() % ALIGNMENT

    weight.data = _placed(weight.data.t(), 0).t()
    vars(linear)[MISALIGNED] = misaligned
    return True


@torch.no_grad()
def store_row_major(linear: nn.Linear) -> None:
    """Undo :func:`store_column_major`, where it has been done."""
    misaligned = vars(linear).pop(MISALIGNED, None)
    if misaligned is not None:
        linear.weight.data = _placed(linear.weight.data, misaligned)


def _placed(values: Tensor, misaligned: int) -> Tensor:
    """A contiguous copy, on a CPU ``misaligned`` bytes after a multiple of :data:`ALIGNMENT`: the last bit of a product
    depends on the alignment of its factors. It fills its storage: safetensors saves no part of one."""
    if values.device.type != "cpu" or misaligned % values.element_size():
        return values.contiguous() if not values.is_contiguous() else values.clone()
    size = values.numel() * values.element_size()
    memory = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = (misaligned - memory.ctypes.data) % ALIGNMENT
    return torch.from_numpy(memory[start : start + size]).view(values.dtype).view(values.shape).copy_(values)
