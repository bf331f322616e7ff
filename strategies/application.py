"""How weights are cut: smaller matrices, or zeros."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..registry import MaskApplier, Selection, hookimpl


class Slice(MaskApplier):
    """Compute with the kept rows and columns only: really smaller and faster."""

    name: Literal["slice"] = "slice"

    def producer(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> tuple[Selection, Selection | None]:
        return Selection(weight, rows), None if bias is None else Selection(bias, rows)

    def consumer(self, weight: Tensor, columns: Tensor) -> Selection:
        return Selection(weight, columns, dim=1)


class Zero(MaskApplier):
    """Keep all sizes, and set the consumer's weights of dropped channels to zero: the reference for ``slice``."""

    resizes: ClassVar[bool] = False
    name: Literal["zero"] = "zero"

    def producer(self, weight: Tensor, bias: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def consumer(self, weight: Tensor, columns: Tensor) -> Tensor:
        kept = torch.zeros(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return weight * kept.index_fill(0, columns, 1)


@hookimpl
def mask_appliers() -> list[type[MaskApplier]]:
    return [Slice, Zero]
