"""The steps of a decision, announced to whoever measures them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from ...registry import Stage

NOBODY = nullcontext()


class Stages:
    """Called with a step's name around that step; costs next to nothing while nobody watches."""

    def __init__(self) -> None:
        self._watcher: Stage | None = None

    def __call__(self, name: str) -> AbstractContextManager:
        return NOBODY if self._watcher is None else self._watcher(name)

    @property
    def watched_now(self) -> bool:
        """Whether anybody is told."""
        return self._watcher is not None

    @contextmanager
    def watched(self, watcher: Stage) -> Iterator[None]:
        """Announce steps to ``watcher`` within; an outer one waits meanwhile."""
        outer, self._watcher = self._watcher, watcher
        try:
            yield
        finally:
            self._watcher = outer
