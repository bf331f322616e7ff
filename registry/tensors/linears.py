"""Linear layers of any class: torch's, those of other libraries, and transformers' ``Conv1D`` with a transposed weight.

Letters: O outputs and I inputs of a layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: it states its sizes."""
    return hasattr(module, "in_features") or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer stores its weight as (I, O): ``Conv1D`` does, which calls its sizes ``nx`` and ``nf``."""
    return getattr(module, "transposed", False) or (hasattr(module, "nx") and hasattr(module, "nf"))


def sizes_of(module: Any) -> tuple[int, int]:
    """Outputs O and inputs I of a linear layer."""
    if hasattr(module, "in_features"):
        return module.out_features, module.in_features
    return module.nf, module.nx


def matrix_of(module: Any) -> Tensor:
    """The weight of a linear layer as (O, I), however it is stored; it shares the memory of the parameter."""
    return module.weight.t() if is_transposed(module) else module.weight
