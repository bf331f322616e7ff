"""What the checks share: made-up sites and tensors, and what is expected of results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..sites import Producer, Rows, Site, SiteKind

UNITS, UNIT_SIZE = 6, 4


def expect(condition: bool, component: Any, message: str) -> None:
    """Raise :class:`AssertionError` naming the component unless ``condition`` holds."""
    if not condition:
        name = component.__name__ if isinstance(component, type) else type(component).__name__
        raise AssertionError(f"{name} {message}")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_site(kind: SiteKind, layer: int = 0) -> Site:
    """A site of 24 channels: six heads of four, or 24 MLP channels."""
    units, size = (UNITS, UNIT_SIZE) if kind == "attention" else (UNITS * UNIT_SIZE, 1)
    producer = Producer("up", (Rows(0, size),))
    return Site(layer, kind, "norm", kind, (producer,), "down", units, size, unit_parameters=40 * size, outputs=20)


def both_kinds() -> tuple[Site, Site]:
    """A site of either kind."""
    return some_site("attention"), some_site("mlp")


def reordered(site: Site) -> tuple[Tensor, Tensor]:
    """The site's units (U,) in another order, and its channels (C,) in that order of units, shuffled within each."""
    units = draw(site.units, seed=21).argsort()
    within = draw(site.units, site.unit_size, seed=22).argsort(1)
    return units, (units[:, None] * site.unit_size + within).reshape(-1)


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal up to rounding."""
    tolerance = 1e-5 * float(other.abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=tolerance)


def expect_tensor(
    value: Any, component: Any, what: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """``value``, which must be a finite tensor of this shape and dtype."""
    expect(isinstance(value, Tensor), component, f"must return {what} as a tensor, found {value!r}")
    found = f"found {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    wanted = f"{str(dtype).removeprefix('torch.')} {shape}"
    expect(value.shape == shape and value.dtype == dtype, component, f"must return {what} as {wanted}, {found}")
    expect(bool(value.isfinite().all()), component, f"returns {what} with NaN or infinity for finite input")
    return value


def expect_unchanged(component: Any, what: str, before: Tensor, after: Tensor) -> None:
    expect(torch.equal(before, after), component, f"changes the {what} it was given")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in ``value``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dict__"):
        yield from tensors_in(vars(value))
