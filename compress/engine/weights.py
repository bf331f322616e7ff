"""Whether the model's weights are still those that copies and scores were made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...registry.tensors.devices import is_offloaded
from ...registry.tensors.experts import ExpertNorms
from ...registry.tensors.model_state import ModelState

if TYPE_CHECKING:
    from .site_cut import SiteCut

WIDTH = 32749
"""Sums per weight. A prime, so that rows which change places are added to other sums; torch adds few rows fastest."""


def differentiates(linear: nn.Linear) -> bool:
    """Whether gradients go through the layer's weight or bias, and so through copies of them."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in linear.parameters(recurse=False))


def weights_version(linear: nn.Linear) -> tuple:
    """Changes whenever the layer's weight or bias is replaced, moved, cast or written to, except through ``.data``.

    Offloaded weights are new tensors in every forward, read from a store that nothing writes to: they never change.
    Tensors made in inference mode do not count their versions.
    """
    if hasattr(linear, "_hf_hook") and is_offloaded(linear):
        return ("offloaded",)
    # What is computed wherever it is read has the version of what it is computed from.
    weight, bias = linear.source if isinstance(linear, ExpertNorms) else linear.weight, linear.bias
    version = (weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version)
    if bias is None:
        return version
    return *version, bias.data_ptr(), bias.dtype, 0 if bias.is_inference() else bias._version


def made_of(linear: nn.Linear) -> tuple:
    """The weights that something was made of, and whether in inference mode: outside of it, it cannot be used then."""
    return *weights_version(linear), torch.is_inference_mode_enabled()


class WeightsWatch:
    """Notices weights that were written to in any way, also through ``.data``, which torch does not count."""

    def __init__(self, cuts: Sequence[SiteCut]):
        self._cuts = cuts
        self._known: Tensor | None = None

    @torch.no_grad()
    def changed(self) -> bool:
        """Whether any weight that copies or scores are made of has changed since the last call."""
        sums = [each for tensor in self._tensors() for each in contents(tensor.detach())]
        now = torch.cat([each.to(sums[0].device) for each in sums]) if sums else None
        known, self._known = self._known, now
        if now is None or known is None:
            return known is not now
        return known.device != now.device or not torch.equal(known, now)

    def _tensors(self) -> Iterator[Tensor]:
        for cut in self._cuts:
            reads_producers = cut.fixed is not None or cut.state.scores_producers
            producers = [linear for linear, _ in cut.binding.producers] if reads_producers else []
            for linear in [] if cut.whole else [*producers, cut.binding.consumer]:
                if not is_offloaded(linear) and not differentiates(linear):
                    yield from linear.parameters(recurse=False)


class ReplacedWeights:
    """Other weights for layers, which compute with them after ``turn(True)``.

    A state dict of the model has the layers' own weights all the time.
    """

    def __init__(self) -> None:
        self._given: Mapping[nn.Module, Tensor] = {}
        self._own: dict[nn.Module, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def use(self, given: Mapping[nn.Module, Tensor]) -> None:
        """Put these weights, in the shapes of the layers' own, in their place from the next :meth:`turn` on."""
        self.put_back()
        self._given = given

    @property
    def given(self) -> Collection[Tensor]:
        """The values, which are held besides the model."""
        return self._given.values()

    @property
    def are_put(self) -> bool:
        """Whether the layers compute with the given values now."""
        return bool(self._own)

    def turn(self, on: bool) -> None:
        """Have the layers compute with the given values, or with their own."""
        if not on:
            self.put_back()
        elif not self._own:
            for linear, given in self._given.items():
                weight: Any = linear.weight
                self._own[linear] = weight.data
                self._hooks.append(linear.register_state_dict_post_hook(partial(_save, own=weight.data)))
                weight.data = given

    def put_back(self) -> None:
        """Have them compute with their own."""
        while self._own:
            linear, own = self._own.popitem()
            weight: Any = linear.weight
            weight.data = own
        while self._hooks:
            self._hooks.pop().remove()


def _save(linear: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, *, own: Tensor) -> None:
    """Keep given values out of a state dict: what it has of a pruned model is the dense one."""
    weight = state[f"{prefix}weight"]
    state[f"{prefix}weight"] = nn.Parameter(own, weight.requires_grad) if isinstance(weight, nn.Parameter) else own


class ModelWatch(ModelState):
    """A model's state, which also notices parameters that were written to through ``.data``.

    It reads all parameters that are in memory when it is made and when :meth:`weights` is called.
    """

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._sums = self._contents()

    def weights(self) -> list[str]:
        now = self._contents()
        written = (name for name, sums in self._sums.items() if name in now and not _equal(sums, now[name]))
        return list(dict.fromkeys([*super().weights(), *written]))

    @torch.no_grad()
    def _contents(self) -> dict[str, Tensor]:
        parameters = ((name, each.detach()) for name, each in self._model.named_parameters() if not each.is_meta)
        return {name: torch.cat(contents(tensor)) for name, tensor in parameters}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and torch.equal(one, other)


def contents(tensor: Tensor) -> list[Tensor]:
    """Sums over the bytes of a tensor, int64: different after an element has changed, or elements changed places.

    They are the same where all that changed is the order of rows that are a multiple of :data:`WIDTH` rows apart.
    """
    flat = (tensor if tensor.dim() < 2 or tensor.is_contiguous() else tensor.t()).reshape(-1)
    per = 8 // flat.element_size()
    if flat.storage_offset() % per:
        flat = flat.clone()
    odd = len(flat) % per
    words = flat[: len(flat) - odd].view(torch.int64)
    rows = len(words) // WIDTH
    sums = [words[: rows * WIDTH].view(rows, WIDTH).sum(0), words[rows * WIDTH :]]
    return [*sums, flat[-odd:].view(torch.uint8).long()] if odd else sums
