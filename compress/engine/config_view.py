"""A configuration that one module reads, with sizes of its own; others read the one that they share."""

from __future__ import annotations

from typing import Any

from torch import nn

CONFIG = "config."
"""Prefix of a :class:`~prunekit.registry.ShapeAttribute` of the configuration."""


class ConfigView:
    """Reads a configuration, except for the attributes that are set on it."""

    def __init__(self, viewed: Any):
        self.__dict__["viewed"] = viewed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked while a copy is made, when nothing is there yet
            raise AttributeError(name)
        return getattr(self.__dict__["viewed"], name)


def use_view(module: nn.Module, view: ConfigView) -> None:
    """Have the module read its configuration through ``view``."""
    vars(module)["config"] = view


def leave_view(module: nn.Module, view: ConfigView) -> None:
    """Undo :func:`use_view`, unless something else has set the configuration since then."""
    if vars(module).get("config") is view:
        vars(module)["config"] = view.viewed
