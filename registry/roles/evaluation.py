"""The evaluator's role: it measures a model and never learns which strategy ran."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from ..component import Component
from ..errors import PluginError, SpecError
from ..sites import Site, SiteKind
from ..text import TextSource

Stage = Callable[[str], AbstractContextManager]
"""Is told the name of a step of the deciding (one of :data:`STAGES`) and gives a context that lasts as long."""

STAGES = ("select", "probe", "score", "gather", "compensate", "history")
"""Steps that a pruned forward pass has besides the model's own: choosing what to probe, running ahead on it, scoring,
copying the kept weights together, giving back what was dropped, and learning from what the batch showed."""


@dataclass
class Measurement:
    """Values and the protocol without which they mean nothing (window, tokens, order, dtype, ...)."""

    values: dict[str, float | int | None]
    protocol: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """What is no single number: values per layer, losses per window (plain lists, dicts and numbers)."""


@dataclass
class Subject:
    """What an evaluator may touch: a model that is called like any other, and how to read text.

    The fields with defaults describe a model that nothing was cut from.
    """

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
    reset: Callable[[], None] = lambda: None
    """Puts channel histories back to their calibrated state, to begin a measurement anew."""
    measure: Callable[[Evaluator | str], Measurement] = lambda evaluator: _unavailable("measure")
    """What another evaluator measures here (unpruned within :attr:`dense`), shared with the run it is part of;
    a name stands for the run's first evaluator of that name, else for one with its defaults. Histories are reset."""
    sites: Sequence[Site] = ()
    """Every place of the model that could be cut, whether it was or not."""
    kept: Callable[[], dict[tuple[int, SiteKind], tuple[int, ...]]] = dict
    """By layer and kind, the units that the last forward pass computed with, ascending."""
    watch: Callable[[Stage], AbstractContextManager] = lambda stage: nullcontext()
    """Within it every step of the deciding is announced to a :data:`Stage`."""
    full_batch: Callable[[], AbstractContextManager] = nullcontext
    """Within it the same number of units is chosen by probing the full batch (PP's upper bound, without history)."""
    held_bytes: Callable[[], dict[str, int]] = dict
    """Bytes that the pruning holds besides the model: its ``statistics`` and ``gathered`` weights."""


def _unavailable(what: str) -> Any:
    raise SpecError(f"this evaluator asks for Subject.{what}, which only a pipeline run offers; list it there")


class Evaluator(Component):
    """Measures a model."""

    paired: ClassVar[bool] = False
    """Whether it measures the dense model in turn with the pruned one itself: values ``x`` and ``dense_x``."""

    def check_options(self) -> None:
        """Raise what is wrong with these options whatever the model, before one is loaded; may be called repeatedly."""

    def check(self, model: Any) -> None:
        """Raise what is wrong with these options for this model, before hours of calibration are spent."""

    @abstractmethod
    def evaluate(self, subject: Subject) -> Measurement:
        """Run the measurement. The pipeline has put the channel histories back to their calibrated state."""


def checked(evaluator: Evaluator, found: Any) -> Measurement:
    """What ``evaluator`` returned, its 0-d tensors and numpy scalars made plain numbers.

    NaN and infinite values get a note. Raises :class:`PluginError` for what is no measurement.
    """
    place = f"evaluator {evaluator.name!r}"
    if not isinstance(found, Measurement):
        raise PluginError(f"{place} returned {type(found).__name__}, expected a Measurement")
    if not isinstance(found.values, Mapping):
        raise PluginError(f"{place}: values is of type {type(found.values).__name__}; return a dict of numbers")
    values: dict[str, float | int | None] = {}
    notes = list(found.notes)
    for name, value in found.values.items():
        if not isinstance(name, str):
            raise PluginError(f"{place}: a value is called {name!r} ({type(name).__name__}); name it by a string")
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(number, bool) or not (number is None or isinstance(number, (int, float))):
            kind = type(value).__name__
            raise PluginError(f"{place}: value {name} is {value!r} ({kind}); return a number or None")
        if number is not None and not math.isfinite(number):
            notes.append(f"value {name} is {number}")
        values[name] = number
    return replace(found, values=values, notes=notes)
