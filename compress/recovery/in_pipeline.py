"""Trains the smaller model of a pipeline, and lets the pruned model compute with the trained weights.

Evaluators then measure it as any static cut, next to the dense model. Afterwards the loaded model is as before.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import ModelError, SpecError
from ..calibration.passes import Progress
from ..export.comparing import compared, logits_of
from ..export.family import Family
from ..export.profiles import Profile, profile_named
from ..export.reload import source_of
from ..export.writing import check_counts, check_possible, layers_left, write_model
from ..files.recover import check_installed
from ..files.spec import PipelineSpec
from ..models.loading import Loaded
from ..models.loading import load as load_model
from ..output.records import Training
from ..pruning.pruned import Pruned
from ..runs.pipeline import Pipeline
from .lora import check_in_memory, train
from .text import text_of

__all__ = ["Pipeline"]

PROFILES = ("hf-hetero", "hf-uniform")
"""The formats of smaller models that can be trained, in order."""

PROFILE, NEAREST = re.compile(r"^profile \S+: "), re.compile(r"[;.] [Nn]earest: ")
"""Parts of an export's error: the format that it speaks of, and what is before its remedies."""


class InPlace:
    """Recovers one run's pruned model in place."""

    def __init__(self, spec: PipelineSpec, loaded: Loaded):
        """Raises :class:`SpecError` and :class:`ModelError` for what cannot be trained, and :class:`DataError` for a
        text that is too short."""
        assert spec.recover is not None
        check_installed()
        check_in_memory(loaded.model)
        self._spec, self._loaded, self._how = spec, loaded, spec.recover
        self._family = Family.of(loaded.model.config, spec.catalog, spec.prune.experts)
        self._profile = self._format()
        with _as_recovery():
            check_possible(self._profile, loaded.model, spec.prune, spec.catalog)
        self._sequences, self._about = text_of(self._how, spec.training_texts, loaded)

    def recover(self, pruned: Pruned, progress: Progress) -> Training:
        """Train the smaller model, and have ``pruned`` compute with its weights."""
        model, strategy = self._loaded.model, self._spec.prune
        ids = self._sequences[0][None, :64]
        with tempfile.TemporaryDirectory(prefix="prunekit-recover-") as place:
            with _as_recovery():
                check_counts(self._profile, model, strategy, pruned.all_sites, pruned.counts, self._family)
                write_model(self._profile, pruned, self._loaded.tokenizer, Path(place))
                left = layers_left(pruned, self._family)
            cut = logits_of(model, ids, None)
            with pruned.suspended():  # its copies of weights leave the memory
                small = load_model(source_of(Path(place), self._spec.model), check=False)
                self._compare(cut, logits_of(small.model, ids, None), small.model.dtype, "so it was not trained")
                trained, about = train(small.model, self._sequences, self._how, progress)
                small.model = None
                expected, dtype = logits_of(trained, ids, None), trained.dtype
                weights = _of_layers(model, trained, left)
                del trained
        pruned.compute_with(weights)
        self._compare(expected, logits_of(model, ids, None), dtype, "so the row has no result")
        return Training(**about, **self._about)

    @staticmethod
    def _compare(expected: Tensor, found: Tensor, dtype: torch.dtype, then: str) -> None:
        what = "recover: the smaller model and the pruned one give other logits"
        compared(expected, found, dtype, alike=False, what=what, then=then)

    def _format(self) -> Profile:
        for name in PROFILES:
            if self._family.refusal(name) is None:
                return profile_named(name)
        raise ModelError(
            f"recover: a smaller {self._family.kind} is trained, and none can be made: "
            f"{self._family.refusal(PROFILES[0])}; leave recover out"
        )


@contextmanager
def _as_recovery() -> Iterator[None]:
    """A context in which a cut that no smaller model can hold is an error of ``recover``."""
    try:
        yield
    except (SpecError, ModelError) as error:
        reason, *remedies = NEAREST.split(str(error), maxsplit=1)
        nearest = [each for each in re.split(r"[;,] or |; ", "".join(remedies)) if each and "--profile" not in each]
        raise type(error)(
            f"recover: it trains a smaller model, which cannot be written: {PROFILE.sub('', reason)}; nearest: "
            f"{', or '.join([*nearest, 'leave recover out'])}"
        ) from error


def _of_layers(model: Any, trained: Any, left: Sequence[int]) -> dict[nn.Module, tuple[Tensor, Tensor | None]]:
    """Weight and bias of every linear layer of ``trained``, by the layer of ``model`` that it was made of.

    ``left`` are the numbers of the decoder layers of ``model`` that ``trained`` still has.
    """
    before, after = (each.get_decoder().layers for each in (model, trained))
    found: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
    for number, layer in zip(left, after, strict=True):
        for path, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                own: Any = before[number].get_submodule(path)
                weight, bias, device = linear.weight.detach(), linear.bias, own.weight.device
                found[own] = weight.to(device), None if bias is None else bias.detach().to(device)
    return found


Pipeline._recoverer = InPlace
