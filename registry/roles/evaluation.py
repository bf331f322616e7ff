"""The evaluator's role: it measures a model and never learns which strategy ran."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from ..component import Component
from ..errors import PluginError, SpecError
from ..sites import Site, SiteKind
from ..text import TextSource

Item = TypeVar("Item")

Stage = Callable[[str], AbstractContextManager[Any]]
"""Called with a step's name (one of :data:`STAGES`); its context manager is entered while the step runs."""

STAGES = ("select", "probe", "score", "gather", "compensate", "history")
"""Steps of a pruned forward pass besides the model's own: choosing what to probe, running the probe, scoring, copying
the kept weights together, compensating, and updating the history."""


@dataclass
class Measurement:
    """Values and the protocol that they depend on (window, tokens, order, dtype, ...)."""

    values: dict[str, float | int | None]
    protocol: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """Values per layer, losses per window and the like, as plain lists, dicts and numbers."""


class Subject(ABC):
    """What an evaluator may use: a model that is called like any other, and how to read text.

    The methods that are not abstract describe a model that nothing was cut from.
    """

    model: Any
    tokenizer: Any
    sites: Sequence[Site] = ()
    """Every place of the model that can be cut, whether it was or not."""

    def __init__(self, model: Any, tokenizer: Any = None):
        self.model, self.tokenizer = model, tokenizer

    @property
    def depends_on_batch(self) -> bool:
        """Whether rows take different operations: a batch is probed or decided on, or experts have other widths."""
        return False

    @abstractmethod
    def read(self, source: TextSource) -> list[str]:
        """Documents of a text source."""

    def dense(self) -> AbstractContextManager[Any]:
        """Within it the model runs unpruned and no history changes, for paired measurements."""
        return nullcontext()

    def parameters(self) -> int:
        """Parameters without those of the units that are cut; all within :meth:`dense`. Memory still holds all."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def progress(self, items: Iterable[Item], label: str, total: int) -> Iterable[Item]:
        """An iterator over ``items`` that shows how many of ``total`` are done."""
        return items

    def reset(self) -> None:  # noqa: B027
        """Restore the calibrated channel histories, to begin a measurement anew."""

    def measure(self, evaluator: Evaluator | str) -> Measurement:
        """What another evaluator measures here (unpruned within :meth:`dense`), shared with the run; histories reset.

        A name stands for the run's first evaluator of that name, else for one with its defaults.
        """
        raise SpecError("this evaluator calls Subject.measure, which only a pipeline run offers; list it there")

    def kept(self) -> dict[tuple[int, SiteKind], tuple[int, ...]]:
        """By layer and kind, the units that the last forward pass computed with, ascending."""
        return {(site.layer, site.kind): tuple(range(site.units)) for site in self.sites}

    def watch(self, stage: Stage) -> AbstractContextManager[Any]:
        """Within it ``stage`` is called with the name of every step of a decision."""
        return nullcontext()

    def full_batch(self) -> AbstractContextManager[Any]:
        """Within it as many units are chosen by probing the full batch, without history (PP's upper bound)."""
        return nullcontext()

    def held_bytes(self) -> dict[str, int]:
        """Bytes that the pruning holds besides the model: its ``statistics`` and ``gathered`` weights."""
        return {}


class PlainSubject(Subject):
    """An unpruned model and documents that stand for every text source, for tests of evaluators."""

    def __init__(self, model: Any, tokenizer: Any = None, documents: Sequence[str] = ()):
        super().__init__(model, tokenizer)
        self.documents = list(documents)

    def read(self, source: TextSource) -> list[str]:
        return self.documents


class Evaluator(Component):
    """Measures a model."""

    paired: ClassVar[bool] = False
    """Whether it measures the dense and the pruned model in turn itself: values ``x`` and ``dense_x``."""

    row_option: ClassVar[str | None] = None
    """The option with the most tokens of a row; None stands for the model's context there.

    Where a pipeline leaves it out and prunes with a history, it is lowered to ``calibration.length``."""

    def longest_row(self, context: int | None) -> int | None:
        """Most tokens of a row that it runs without a cache, on a model of ``context`` positions.

        None where that is not known before it runs. A strategy with a history runs no longer rows than it was
        calibrated on, so a pipeline that asks for more is refused before anything is loaded.
        """
        if self.row_option is None:
            return None
        known = [tokens for tokens in (getattr(self, self.row_option), context) if tokens is not None]
        return min(known, default=None)

    def check_options(self) -> None:
        """Raise :class:`SpecError` for options that cannot work with any model; called before one is loaded."""

    def check(self, model: Any) -> None:
        """Raise :class:`SpecError` for options that cannot work with this model; called before calibration.

        For a local model it is also called before loading, with an object that has the model's ``config`` alone.
        """

    def plan(self, subject: Subject) -> str:
        """What :meth:`evaluate` will run, such as ``65 windows of 512 tokens``; empty where it is not known before.

        Raises the errors of the text that it reads.
        """
        return ""

    @abstractmethod
    def evaluate(self, subject: Subject) -> Measurement:
        """Run the measurement. The channel histories are as calibrated when it begins."""


def checked(evaluator: Evaluator, found: Any) -> Measurement:
    """The measurement that ``evaluator`` returned, with 0-d tensors and numpy scalars as plain numbers.

    NaN and infinite values get a note. Raises :class:`PluginError` for anything else than a measurement of numbers.
    """
    place = f"evaluator {evaluator.name!r}"
    if not isinstance(found, Measurement):
        raise PluginError(f"{place} returned {type(found).__name__}, expected a Measurement")
    if not isinstance(found.values, Mapping):
        raise PluginError(f"{place}: values is of type {type(found.values).__name__}; return a dict of numbers")
    values: dict[str, float | int | None] = {}
    notes = list(found.notes)
    returned: Mapping[Any, Any] = found.values
    for name, value in returned.items():
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
