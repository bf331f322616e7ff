"""Gradient checkpointing: a layer's recomputation in the backward pass repeats the decisions of its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from ...registry import ModelError
from .batch import Batch, Running

FUNCTION = "_gradient_checkpointing_func"
"""Attribute of a transformers layer: what runs the layer and, in the backward pass, runs it again."""

Again = Callable[[Batch], AbstractContextManager[None]]
"""Within it a batch that has passed is run again."""


class Checkpoint:
    """A layer's checkpointing function: what it runs again belongs to the batch in which it ran first."""

    def __init__(self, function: Callable, running: Running, again: Again):
        self.function, self.running, self.again = function, running, again

    def __call__(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        batch = self.running.batch
        if batch is not None:
            forward = partial(self.run, batch, forward)
        return self.function(forward, *args, **kwargs)

    def run(self, batch: Batch, forward: Callable, *args: Any) -> Any:
        """Run a layer in a batch, which has passed already when it is run again."""
        with self.running.one_at_a_time.lock, self.again(batch) if batch.passed else nullcontext():
            outer = self.running.enter(batch)
            try:
                return forward(*args)
            finally:
                self.running.enter(outer)


def use_checkpoint(layer: nn.Module, running: Running, again: Again) -> None:
    """Replace the layer's checkpointing function, where it has one that is not ours already."""
    function = vars(layer).get(FUNCTION)
    if function is not None and not isinstance(function, Checkpoint):
        vars(layer)[FUNCTION] = Checkpoint(function, running, again)


def restore_checkpoint(layer: nn.Module) -> None:
    """Undo :func:`use_checkpoint`."""
    function = vars(layer).get(FUNCTION)
    if isinstance(function, Checkpoint):
        vars(layer)[FUNCTION] = function.function


def check_not_again() -> None:
    """Raise :class:`ModelError` for a batch that begins in a backward pass: it would decide anew, and learn twice."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise ModelError(
            "the backward pass runs the whole pruned model again (torch.utils.checkpoint around it), and this pruning "
            "would choose other units than in the forward pass; use model.gradient_checkpointing_enable(), which "
            "repeats the choice, or choose the units once for all texts with pruned.freeze()"
        )
