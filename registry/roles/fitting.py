"""The role of scorers that fit something with the model before units are chosen."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..sites import Site
from ..tensors.statistics import Statistic
from .parts import Scorer

if TYPE_CHECKING:
    from torch import nn


class FittedScorer(Scorer):
    """Scores units by what it fits with the model first, such as gradients, learned gates or compared losses.

    Everything is fitted once for a model, a text, these sites and the scorer's options; a study and a statistics file
    keep it. What was fitted is an argument of ``prepare``. With a ``statistic`` it is scored together with that of the
    activations, also in strategies that decide per batch.
    """

    statistic: ClassVar[Statistic | None] = None

    @abstractmethod
    def fit(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Tensor]]) -> Sequence[Tensor]:
        """A tensor for each of ``sites``, in their order: (U,) or (C,), or what its ``prepare`` takes.

        ``model`` is the plain model, in evaluation mode, with gradients on; no parameter requires one yet. ``batches``
        are those of the calibration text: ``input_ids`` and maybe ``attention_mask`` (B, T) int64 on the device of the
        input embeddings. Random numbers of torch begin at the same seed in every call. Flags, gradients, modes and the
        random state are restored afterwards; weights, buffers and hooks must be as before.
        """

    def prepare(self, weight: Tensor, site: Site, fitted: Any = None) -> Any:
        """What was fitted at the site, as scores of its channels: those of a unit share its score; -> (C,)."""
        if len(fitted) == site.channels:
            return fitted
        return fitted.repeat_interleave(site.unit_size) / site.unit_size

    def score(self, prepared: Any, statistic: Any) -> Tensor:
        """The scores of the channels, as prepared; (C,) float32."""
        return prepared
