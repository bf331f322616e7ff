"""A decode step like the one before: with the same cache, decisions and weights, nothing is looked up site by site.

The hooks of a site ask for its decision, and its linear layers for their copies, in every pass. Most steps of a
generation find what the step before found. That is checked here once for the whole step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ...registry import Policy
from ...registry.tensors.caches import cache_among, counts_positions, held
from .batch import Batch
from .decode_cache import MARK, own_cache
from .open_cut import OpenCut
from .site_cut import SiteCut


class Steady:
    """What a decode step has computed with, for the next step of the same cache."""

    def __init__(self, cuts: Sequence[SiteCut], batch: Batch):
        """``batch`` is a step that has passed."""
        cache = own_cache(batch.cache)
        self._cache, self._mark, self._rows = ref(cache), vars(cache)[MARK], batch.shape[0]
        layers = self._mark["layers"]
        self._decided = [(layer, known, dict(known)) for layer, known in layers.items()]
        self._layer = next(layer for layer in layers if counts_positions(cache, layer))
        self._least: int = max(at for known in layers.values() for at in _positions(known))
        """Positions that the cache must hold: fewer are refused by name."""
        self._open: list[tuple[SiteCut, OpenCut | None]] = [(cut, cut.open_cut) for cut in cuts]
        self._inference = torch.is_inference_mode_enabled()
        self._weights = [weight for cut in cuts if cut.open_cut is not None for weight in _weights(cut)]

    @classmethod
    def after(cls, cuts: Sequence[SiteCut], batch: Batch) -> Steady | None:
        """What the next step may repeat; None where a step needs its hooks."""
        cache = own_cache(batch.cache)
        layers = vars(cache).get(MARK, {"layers": ()})["layers"]
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        if not any(counts_positions(cache, layer) for layer in layers):
            return None
        for cut in cuts:
            if cut.absent or cut.site.routed or not (cut.open_cut is None or cut.open_cut.make_ready()):
                return None
        return cls(cuts, batch)

    def again(self, arguments: dict[str, Any], shape: tuple[int, int], policy: Policy) -> int:
        """Positions that the cache holds if a call of the decoder with these arguments is such a step again, else 0.

        ``shape`` is its rows and tokens. A step in which the policy chooses units is another one.
        """
        if shape != (self._rows, 1) or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return 0
        cache = cache_among(arguments)
        own = None if cache is None else own_cache(cache)
        if own is None or own is not self._cache() or vars(own).get(MARK) is not self._mark:
            return 0
        same = (
            self._inference == torch.is_inference_mode_enabled()
            and all(cut.open_cut is before and (not before or before.ready) for cut, before in self._open)
            and all(map(self._known, self._decided))
            and all(map(_unchanged, self._weights))
        )
        length = held(own, self._layer, 1) if same else 0
        if length < self._least or (policy.reads and policy.again(length + 1 - self._least, {})):
            return 0
        return length

    def _known(self, decided: tuple[int, dict[str, Any], dict[str, Any]]) -> bool:
        """Whether what is stored of a layer is what it was."""
        layer, known, before = decided
        same = self._mark["layers"].get(layer) is known and len(known) == len(before)
        return same and all(known.get(key) is value for key, value in before.items())


Weight = tuple[dict[str, Any], str, Tensor, int, int]
"""A module's parameters, the name of one, and the parameter: its address and version when it was copied."""


def _positions(known: dict[str, Any]) -> list[int]:
    """The prompt's length in a layer, and where its sites were decided since."""
    return [known["prompt"], *(since[0] for name, since in known.items() if name.startswith("since "))]


def _weights(cut: SiteCut) -> list[Weight]:
    linears: list[nn.Module] = [linear for linear, _ in cut.binding.producers]
    parameters = [(each._parameters, name) for each in (*linears, cut.binding.consumer) for name in ("weight", "bias")]
    made = ((held_by, name, held_by[name]) for held_by, name in parameters)
    return [(h, name, tensor, tensor.data_ptr(), _version(tensor)) for h, name, tensor in made if tensor is not None]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _unchanged(weight: Weight) -> bool:
    parameters, name, tensor, address, version = weight
    return parameters[name] is tensor and tensor.data_ptr() == address and _version(tensor) == version
