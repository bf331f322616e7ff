"""What the parts of a strategy return and leave: what is wrong there is the plugin's mistake, and named as such."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...registry import Component, PluginError, Site, SpecError
from ...registry.catalog import named


def checked(made: Any, shape: Sequence[int], method: str, role: str, part: Component, site: Site) -> Tensor:
    """``made``, which must be a tensor of this shape; else a :class:`SpecError` names part, method and site."""
    if isinstance(made, Tensor) and tuple(made.shape) == tuple(shape):
        return made
    found = f"shape {tuple(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
    raise SpecError(
        f"{site.label}: {method} of {role} {part.name} returned {found}, expected {tuple(shape)}; fix the plugin"
    )


def written_to(site: Site, part: Component, method: str) -> PluginError:
    """The error for a part that has written to the model's own weights."""
    return PluginError(
        f"{site.label}: {method} of {named(part)} has written to the model's weights, which cannot be undone: load the "
        "model again, and fix the plugin (write to a copy)"
    )


def check_picks(rows: Tensor, positions: Tensor, shape: Sequence[int], selector: Component, site: Site) -> None:
    """Raise :class:`PluginError` for rows or positions that are not in a batch of this shape, or do not ascend."""
    for what, picked, size in (("rows", rows, shape[0]), ("positions", positions, shape[1])):
        found = picked.reshape(-1).tolist()
        inside = bool(found) and min(found) >= 0 and max(found) < size
        if not inside or bool((picked.diff() <= 0).any()):
            raise PluginError(
                f"{site.label}: {named(selector)} picks {what} {found[:8]} of {size}; they must ascend, from 0 to "
                f"{size - 1}, each once; fix the plugin"
            )
