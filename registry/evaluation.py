"""The evaluator's role: it measures a model and never learns which strategy ran."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .component import Component
from .text import TextSource


@dataclass
class Measurement:
    """Values and the protocol without which they mean nothing (window, tokens, order, dtype, ...)."""

    values: dict[str, float | int | None]
    protocol: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass
class Subject:
    """What an evaluator may touch: a model that is called like any other, and how to read text."""

    model: Any
    tokenizer: Any
    read: Callable[[TextSource], list[str]]
    """Documents of a text source."""
    dense: Callable[[], AbstractContextManager]
    """Within it the model runs unpruned (for paired measurements)."""
    parameters: Callable[[], int]
    """Parameters of the units that stay (all of them within :attr:`dense`); a probe and memory still use all."""
    progress: Callable[[Iterator, str, int], Iterator] = lambda items, label, total: items
    """Wraps an iterator of ``total`` items so that a person sees how far it is."""


class Evaluator(Component):
    """Measures a model."""

    paired: ClassVar[bool] = False
    """Whether it measures the dense model in turn with the pruned one itself: values ``x`` and ``dense_x``."""

    @abstractmethod
    def evaluate(self, subject: Subject) -> Measurement:
        """Run the measurement. The pipeline has put the channel histories back to their calibrated state."""
