"""The role of file formats: what a pruned model is written as besides prunekit's own profiles."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from ..component import Component

if TYPE_CHECKING:
    from torch import nn


MadeFrom = Literal["hf-uniform", "hf-hetero", "padded"]
MADE_FROM = get_args(MadeFrom)
"""Profiles that a format may be made from."""


class ExportFormat(Component):
    """Writes a pruned model in another format, by ``prunekit export --profile NAME``.

    The model is written as one of prunekit's profiles first, loaded again, compared with the pruned one and measured.
    The format gets this smaller model. Its files are in a subfolder that has its name, and in the manifest.
    """

    made_from: ClassVar[MadeFrom] = "hf-uniform"
    """The profile that it is made from, whose requirements on the cut it has: equal layers of a stock class; every
    layer its own shape; the original shapes, with zeros."""
    multiple: ClassVar[int] = 1
    """Kept MLP widths are multiples of it."""

    def check(self, config: Any) -> None:
        """Raise :class:`ModelError` for a model that it cannot hold, by the dense model's configuration.

        It is called before the model is loaded.
        """

    @abstractmethod
    def write(self, model: nn.Module, tokenizer: Any, folder: Path) -> Sequence[str]:
        """Write the smaller model into ``folder``, which is empty; returns notes for the user, one sentence each.

        Raises :class:`SpecError` or :class:`ModelError` for shapes that it cannot hold: then nothing is written.
        """
