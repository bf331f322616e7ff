"""What happens while a batch goes through the model: every site is probed, decided, opened, learnt from and closed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...registry import Strategy
from . import probe_reuse
from .call_arguments import named as named_arguments
from .call_arguments import valid_tokens
from .decider import Decider
from .decode_cache import CacheDecisions
from .look_ahead import following_sites
from .probing import CACHE_ARGUMENT, SiteInput
from .records import Decision
from .runtime import Runtime
from .side_stream import SideStreams
from .site_cut import SiteCut

Mode = Literal["dense", "calibrate", "prune"]

Learn = Callable[[SiteCut, Tensor, "Tensor | None"], None]
"""Takes what enters a consumer, (B, T, C), and the batch's real tokens (B, T) or None."""


class ForwardPass:
    """The hooks of a forward pass, in the order in which they are called, and what is known while it lasts."""

    def __init__(self, cuts: list[SiteCut], strategy: Strategy, decider: Decider, runtime: Runtime, trace: list | None):
        self.cuts, self.decider, self.runtime, self.trace = cuts, decider, runtime, trace
        self.mode: Mode = "dense"
        self.batch = -1
        self.calibrated: Collection[SiteCut] | None = None
        """Sites that calibration looks at; None for all."""
        self.learn: Learn = decider.calibrate
        """What calibration does with what enters a site's consumer."""
        self._following = following_sites(cuts) if strategy.decides_ahead else {}
        self._decisions = CacheDecisions()
        self._side = SideStreams(runtime.overlap)
        self._counted = False
        self._shape = (0, 0)
        self._valid: Tensor | None = None
        self._attention_arguments: dict[str, Any] = {}

    @property
    def tokens(self) -> int:
        """Of the batch that goes through."""
        return self._shape[0] * self._shape[1]

    def enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A batch begins."""
        named = named_arguments(module, args, kwargs)
        tokens = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
        self._shape = tuple(tokens.shape[:2])
        self._valid = valid_tokens(named.get("attention_mask"), *self._shape)
        self._decisions.leave()
        self._counted = False
        if self.runtime.compile is not None and self.mode == "prune":
            with torch.no_grad():
                for cut in self.cuts:
                    cut.refresh()

    def enter_layer(self, index: int) -> Callable:
        """A layer begins."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            cache = named_arguments(layer, args, kwargs).get(CACHE_ARGUMENT)
            self._decisions.enter(index, cache, self.mode == "prune")

        return hook

    def enter_norm(self, cut: SiteCut) -> Callable:
        """A site's norm reads the residual stream."""

        def hook(norm: nn.Module, args: tuple) -> None:
            cut.residual = args[0]

        return hook

    def enter_site(self, cut: SiteCut) -> Callable:
        """A block is about to read the normed states."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            residual, cut.residual = cut.residual, None
            if self.mode != "prune" or cut.probing:
                return
            arguments = named_arguments(module, args, kwargs)
            if not cut.whole:
                known = self._decisions.of(cut)
                if known is not None:
                    cut.open(*known, stays=True)
                    return
                self._decide(cut, residual, args[0] if args else kwargs["hidden_states"], arguments)
            if self._following:
                self._look_ahead(cut, residual, arguments)

        return hook

    def _decide(self, cut: SiteCut, residual: Tensor, hidden: Tensor, arguments: dict) -> None:
        """Open a site's cut for this batch."""
        if not (self._counted or torch.compiler.is_compiling()):  # what changes would be compiled for anew
            self.batch += 1
            self._counted = True
        decision, cut.decided_ahead = cut.decided_ahead, None
        if decision is None:
            device = cut.history.device
            hidden, residual = (t.to(device).reshape(*self._shape, t.shape[-1]) for t in (hidden, residual))
            given = SiteInput(residual, hidden, self._valid_on(device), arguments, self._reuses(cut, hidden))
            decision = self.decider.decide(cut, given)
        else:
            self._side.join()
        stays = cut.fixed is not None or self._decisions.cache is not None
        cut.open(decision.kept, decision.probe_mean, stays)
        self._decisions.remember(cut, decision.kept, decision.probe_mean)
        self.record(cut, self.batch, decision)

    def _look_ahead(self, cut: SiteCut, residual: Tensor, arguments: dict) -> None:
        """Decide for the next site from what this one is about to read."""
        if cut.site.kind == "attention":
            self._attention_arguments = arguments
        following = self._following.get(cut)
        if following is None or following.whole or residual.device != following.history.device:
            return
        if self._decisions.filled:  # its cut goes with the cache
            return
        residual = residual.reshape(*self._shape, residual.shape[-1])
        theirs = self._attention_arguments if following.site.kind == "attention" else {}
        given = SiteInput(residual, None, self._valid_on(residual.device), theirs)
        with self._side.beside(residual):
            decision = following.decided_ahead = self.decider.decide(following, given)
            if self._side.used and following.fixed is None and not self.runtime.fused_gather:
                following.prefetch(decision.kept, self._decisions.cache is not None)
        self._side.share(decision.kept, decision.probe_mean)

    def _reuses(self, cut: SiteCut, hidden: Tensor) -> bool:
        """Whether what the probe computes serves the batch, too."""
        if not (self.runtime.reuse_probe and cut.weights.selects and cut.fixed is None and hidden.is_contiguous()):
            return False
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        return plain and probe_reuse.pays(hidden)

    def observe(self, cut: SiteCut, x: Tensor) -> None:
        """History learns from what enters a consumer: everything in calibration, kept channels afterwards."""
        if not self._learns_from(cut):
            return
        x, valid = x.detach().reshape(*self._shape, x.shape[-1]), self._valid_on(x.device)
        if self.mode == "calibrate":
            with torch.no_grad():
                self.learn(cut, x, valid)
            return
        _ = cut.weights.columns  # kept, once made: not to be made beside what the model itself is going to read
        with torch.no_grad(), self._side.beside(x):
            self.decider.learn(cut, x, valid)
        self._side.share(*(cut.pending or ()))

    def _learns_from(self, cut: SiteCut) -> bool:
        if self.mode == "calibrate":
            return self.calibrated is None or cut in self.calibrated
        # Not in decode steps: their tokens stand elsewhere than their columns say.
        return self.mode == "prune" and self.decider.learns and cut.kept is not None and not self._decisions.filled

    def leave_site(self, cut: SiteCut) -> Callable:
        """The consumer has computed."""

        def hook(consumer: nn.Module, args: tuple, output: Any) -> None:
            if self.mode != "prune" or cut.probing:
                return
            cut.probed = None
            # Without a cache nothing will ask for this cut again: its gathered weights can go.
            if self._decisions.cache is None and cut.fixed is None:
                cut.close()

        return hook

    def succeed(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The batch has gone through."""
        self._side.join()
        with torch.no_grad():
            self.decider.commit(self.cuts)
        if self.runtime.compile is not None:  # the next pass of a CUDA graph writes where this one's results lie
            for cut in self.cuts:
                cut.computed = None if cut.computed is None else cut.computed.clone()

    def leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The batch has ended, well or not."""
        self._side.join()
        for cut in self.cuts:
            if self.mode == "prune" and self._decisions.cache is None and cut.fixed is None:
                cut.close()
            cut.decided_ahead = cut.residual = None
        self.decider.forget(self.cuts)
        self._decisions.leave()
        self._valid, self._attention_arguments = None, {}

    def padding_of(self, states: Tensor) -> Tensor | None:
        """Padded tokens (b, t) of the full batch, or of the probe while one runs; None where all are real."""
        if self.mode != "prune" or self._valid is None:
            return None
        valid = self.decider.probe_valid if self.decider.probe_valid is not None else self._valid_on(states.device)
        return ~valid

    def record(self, cut: SiteCut, batch: int | None, decision: Decision) -> None:
        """Add a decision to the trace, where one is kept; ``batch`` is None for decisions made once."""
        if self.trace is not None:
            where = {"batch": batch, "layer": cut.site.layer, "kind": cut.site.kind}
            seen = {name: getattr(decision, name).tolist() for name in ("kept", "rows", "positions")}
            self.trace.append(where | seen)

    def _valid_on(self, device: torch.device) -> Tensor | None:
        """The batch's real tokens where a layer computes: the batch may come from elsewhere."""
        if self._valid is not None and self._valid.device != device:
            self._valid = self._valid.to(device)
        return self._valid
