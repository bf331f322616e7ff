"""Where a site lies in the model, and what is known of it from calibration and earlier batches.

What it computes with now is in :mod:`.open_cut`. Letters: k kept units, C all channels, O outputs of the consumer.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import (
    ChannelHistory,
    GroupPart,
    ModelError,
    Producer,
    Scorer,
    Site,
    SiteScores,
    Strategy,
    linear_at,
)
from ...registry.tensors.devices import device_of, weights_present
from ...registry.tensors.linears import matrix_of
from .choosing import Choice
from .compensation import SiteCompensation
from .config_view import CONFIG, ConfigView
from .shapes import written_to
from .weights import made_of, weights_version


@dataclass(frozen=True, eq=False)
class SiteBinding:
    """Where a site lies in the model; it never changes."""

    site: Site
    entry: nn.Module
    norm: nn.Module | None
    consumer: nn.Linear
    producers: tuple[tuple[nn.Linear, Producer], ...]
    attributes: tuple[tuple[Any, str, int, Any], ...]
    """The sizes that the block's forward reads: module, name, size of one unit, and of the whole site."""
    activation: nn.Module | None
    own_norm: bool
    """Whether the norm serves this site alone."""
    views: tuple[tuple[nn.Module, ConfigView], ...]
    """Modules that read sizes from a configuration, and what they read them from while the site is pruned."""

    @classmethod
    def of(cls, site: Site, model: nn.Module, own_norm: bool = True) -> SiteBinding:
        """Look up the site's modules in ``model``."""
        find: Callable[[str], Any] = partial(linear_at, model)
        views = {a.path: ConfigView(find(a.path).config) for a in site.shape_attributes if CONFIG in a.attribute}
        places = [(views[a.path] if CONFIG in a.attribute else find(a.path), a) for a in site.shape_attributes]
        return cls(
            site=site,
            entry=find(site.entry),
            norm=find(site.norm) if site.norm else None,
            consumer=find(site.consumer),
            producers=tuple((find(producer.path), producer) for producer in site.producers),
            attributes=tuple(
                (place, name := a.attribute.removeprefix(CONFIG), a.per_unit, getattr(place, name))
                for place, a in places
            ),
            activation=find(site.activation) if site.activation else None,
            own_norm=own_norm,
            views=tuple((find(path), view) for path, view in views.items()),
        )

    @property
    def parameters(self) -> int:
        """Parameters of the whole block, its norm included."""
        if self.site.expert is not None:
            return sum(p.numel() for linear, _ in (*self.producers, (self.consumer, None)) for p in linear.parameters())
        norm = [self.norm] if self.own_norm and self.norm is not None else []
        modules = nn.ModuleList([*norm, self.entry, *(linear for linear, _ in self.producers), self.consumer])
        return sum(parameter.numel() for parameter in modules.parameters())

    def normed(self, residual: Tensor) -> Tensor:
        """What the entry reads of the residual stream; (..., D) -> (..., D)."""
        return residual if self.norm is None else self.norm.forward(residual)

    def check_read(self, called: Set[nn.Module]) -> None:
        """Raise :class:`ModelError` if the block has computed without calling all of its linear layers."""
        linears = [*((linear, producer.path) for linear, producer in self.producers)]
        linears.append((self.consumer, self.site.consumer))
        unread = [path for linear, path in linears if linear not in called]
        if unread:
            forward = self.entry.forward
            name = getattr(forward, "__qualname__", type(forward).__name__)
            raise ModelError(
                f"{self.site.label}: {self.site.entry} computed without calling {', '.join(unread)}, so that a cut "
                f"there has no effect; its forward, {name}, may have been replaced (by fused kernels, say): undo that, "
                "load the model again, or leave the layer out (skip_layers)"
            )


class SiteState:
    """What is known of a site from calibration and earlier batches."""

    def __init__(self, binding: SiteBinding, strategy: Strategy):
        site = binding.site
        self.binding = binding
        self.statistic = strategy.scorer.statistic
        """What the history keeps of the activations; None for scores of the weights alone, or of gradients."""
        self.scores_producers = strategy.scorer.uses_producers
        """Whether the score depends on the producers' weights."""
        self.scores_gradients = strategy.scores_gradients
        self.gradients: tuple[GroupPart, ...] = ()
        """What the scorer made of the gradients of the site's matrices; empty before calibration, or if it reads
        none."""
        self.fits = strategy.fits
        """Whether the scorer fits something with the model."""
        self.fitted: Tensor | None = None
        """What it has fitted at the site."""
        self.router_weights = strategy.router_weights and site.expert is not None
        """Whether statistics are weighted by the router."""
        self.unreached = False
        """Whether calibration has reached this routed expert by no token, so that its units are scored by weights."""
        self.history = ChannelHistory(site.channels, device_of(binding.consumer))
        self.compensation = SiteCompensation(site, strategy.compensate)
        self.chooser = strategy.chooser
        """What orders the units jointly, if the strategy's scorer does."""
        self.choice: Choice | None = None
        """The order that it has found."""
        self.count = site.units
        """Units that the site keeps, the same in every batch."""
        self.whole = True
        """Whether it keeps everything, so that there is nothing to decide."""
        self.fixed: Tensor | None = None
        """(k,) int64 ascending: the kept units where they are decided once."""
        self.given: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        """By layer, weight and bias that take the place of what the fixed units have of the model's own, compensation
        included."""
        self.unscored = SiteScores(site)
        """What an allocator gets of the site where it has no scores."""
        self._prepared: tuple[tuple, Any] | None = None
        self._mean_output: tuple[tuple, Tensor] | None = None

    def keep(self, count: int) -> None:
        """Keep ``count`` units from now on."""
        self.count, self.whole = count, count >= self.binding.site.units

    @property
    def settled(self) -> bool:
        """Whether it keeps everything or nothing, so that no batch decides."""
        return self.whole or not self.count

    def fix(self, kept: Tensor | None) -> None:
        """Keep the units ``kept`` (k,) in every batch; None: they are decided per batch."""
        self.fixed = kept

    def describe_blocks(self, block: float, layer: float) -> None:
        """Give the allocator these statistics of the site's block and of its layer."""
        self.unscored = replace(self.unscored, block_statistic=block, layer_statistic=layer)

    def describe_weights(self, layer: float) -> None:
        """Give the allocator this statistic of the weights of the site's layer."""
        self.unscored = replace(self.unscored, weight_statistic=layer)

    def replace_history(self, history: ChannelHistory) -> None:
        """Replace the history."""
        self.history = history

    def restore(self, history: ChannelHistory, count: int, fixed: Tensor | None) -> None:
        """Use the results of an earlier calibration."""
        self.replace_history(history)
        self.keep(count)
        self.fix(fixed)

    def use_fitted(self, fitted: Tensor | None) -> None:
        """Score by ``fitted`` from now on."""
        self.fitted, self._prepared = fitted, None

    def forget_weights(self) -> None:
        """Compute anew what was computed from the weights."""
        self._prepared = self._mean_output = None

    @property
    def has_scores(self) -> bool:
        """Whether there are scores before any batch: of the weights alone, of what calibration has shown, or of a
        chooser."""
        if self.chooser is not None:
            return self.choice is not None
        if self.scores_gradients:
            return bool(self.gradients)
        if self.fits and self.fitted is None:
            return False
        return self.statistic is None or self.history.positions > 0

    @property
    def calibrated(self) -> Any:
        """What calibration has shown, as the scorer reads it: the statistic (C,), reduced gradients, or None."""
        if self.scores_gradients:
            return self.gradients
        return None if self.statistic is None else self.statistic.summed(self.history)

    @property
    def bytes(self) -> int:
        """Bytes of the site's statistics, those of its compensation included."""
        fitted = 0 if self.fitted is None else self.fitted.nbytes
        return self.history.bytes + self.compensation.bytes + fitted

    def prepared(self, scorer: Scorer) -> Any:
        """The weights' part of the score, computed once for as long as the weights stay what they are."""
        known, linears = self._prepared, [self.binding.consumer]
        if known is not None and torch.compiler.is_compiling():
            return known[1]
        if self.scores_producers:
            linears += [linear for linear, _ in self.binding.producers]
        version = tuple(map(weights_version, linears))
        if known is None or known[0] != version:
            prepare: Any = scorer.prepare
            with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
                for linear in linears:
                    stack.enter_context(weights_present(linear))
                weight, *producers = [matrix_of(linear).detach().float() for linear in linears]
                more = (producers,) if self.scores_producers else ()
                fitted = {"fitted": self.fitted} if self.fits else {}
                self._prepared = known = version, prepare(weight, self.binding.site, *more, **fitted)
            if tuple(map(weights_version, linears)) != version:
                raise written_to(self.binding.site, scorer, "prepare")
        return known[1]

    def mean_output(self, mean: Tensor) -> Tensor:
        """``W @ mean`` (O,) float32 for the calibrated mean (C,), computed once for as long as W stays what it is."""
        linear, known = self.binding.consumer, self._mean_output
        version = made_of(linear)
        if known is None or known[0] != version:
            self._mean_output = known = version, matrix_of(linear).float() @ mean
        return known[1]
