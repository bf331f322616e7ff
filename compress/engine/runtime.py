"""Options of how a pruned model computes, and the watcher of its steps. With every option the same units are kept, and
outputs agree up to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...registry import STAGES, Stage

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""torch's own names."""


class Runtime(BaseModel):
    """What is done for speed where cuts are made per batch; all of it can be switched off.

    It serves appliers that return selections (``slice``). Where a setting cannot be used (gradients, offloaded
    weights, compiled code, another kind of device) the model runs without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column_major: bool = Field(
        default=True,
        description="while the model is pruned, store the consumers' weights (o_proj, down_proj, fc2) transposed, so "
        "that gathering columns copies whole rows; remove() puts them back",
    )
    shared_buffers: bool = Field(
        default=True,
        description="gather into memory that is used again, one piece for all sites of a kind; false: into new",
    )
    reuse_probe: bool = Field(
        default=True,
        description="in small float32 batches on a CPU, take what q/k/v, gate/up or fc1 made of the probe's tokens as "
        "it is instead of computing it again with the batch",
    )
    fused_gather: bool = Field(
        default=False,
        description="on a CUDA device with Triton, read the kept rows and columns inside the matrix product instead of "
        "gathering them first",
    )
    overlap: bool = Field(
        default=True,
        description="on a CUDA device, learn history, and decide ahead where the selector asks for it, at the "
        "same time as the model's own work",
    )
    compile: CompileMode | None = Field(
        default=None,
        description="compile the decoder by torch.compile in this mode (reduce-overhead: with CUDA graphs); passes "
        "with a key/value cache or gradients run as they are; null: do not",
    )


class Stages:
    """The steps of a decision: context managers, by the names of :data:`~prunekit.registry.STAGES`.

    They do nothing while there is no watcher.
    """

    select: AbstractContextManager[Any]
    probe: AbstractContextManager[Any]
    score: AbstractContextManager[Any]
    gather: AbstractContextManager[Any]
    compensate: AbstractContextManager[Any]
    history: AbstractContextManager[Any]

    def __init__(self) -> None:
        self._watch(None)

    def _watch(self, watcher: Stage | None) -> None:
        self.watcher = watcher
        for name in STAGES:
            setattr(self, name, nullcontext() if watcher is None else _Announced(watcher, name))

    @contextmanager
    def watched(self, watcher: Stage) -> Iterator[None]:
        """Within it every step is announced to ``watcher``, and not to an outer one."""
        outer = self.watcher
        self._watch(watcher)
        try:
            yield
        finally:
            self._watch(outer)


class _Announced:
    """Calls a watcher with a step's name, and enters the context that it returns for as long as the step lasts."""

    def __init__(self, watcher: Stage, name: str):
        self._watcher, self._name = watcher, name
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        context = self._watcher(self._name)
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *raised: Any) -> None:
        self._entered.pop().__exit__(*raised)
