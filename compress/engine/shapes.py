"""What the parts of a strategy return: of another shape, it is the plugin's mistake, and named as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...registry import Component, Site, SpecError


def checked(made: Any, shape: Sequence[int], method: str, role: str, part: Component, site: Site) -> Tensor:
    """``made``, which must be a tensor of this shape; else a :class:`SpecError` names part, method and site."""
    if isinstance(made, Tensor) and tuple(made.shape) == tuple(shape):
        return made
    found = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    raise SpecError(
        f"{site.label}: {method} of {role} {part.name} returned {found}, expected {tuple(shape)}; fix the plugin"
    )
