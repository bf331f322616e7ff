"""The evaluator's role: it measures a model and never learns which strategy ran."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .component import Component
from .errors import SpecError
from .sites import Site, SiteKind
from .text import TextSource

Stage = Callable[[str], AbstractContextManager]
"""Is told the name of a step of the deciding (one of :data:`STAGES`) and gives a context that lasts as long."""

STAGES = ("select", "probe", "score", "gather", "history")
"""Steps that a pruned forward pass has besides the model's own: choosing what to probe, running ahead on it, scoring,
copying the kept weights together, and learning from what the batch showed."""


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

    def check(self, model: Any) -> None:
        """Raise what is wrong with these options for this model, before hours of calibration are spent."""

    @abstractmethod
    def evaluate(self, subject: Subject) -> Measurement:
        """Run the measurement. The pipeline has put the channel histories back to their calibrated state."""
