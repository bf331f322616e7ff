"""Installs a strategy on a loaded model, and removes it: the model is then bit-identical to before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import ChannelHistory, Component, OneForAll, PerPrompt, Site, SpecError, Strategy
from ...registry.catalog import is_foreign, named
from ...registry.sites import owned_norms
from . import linears
from .batch import Mode, learn_parameters
from .calls import DecoderForward, save_dense
from .checkpointing import restore_checkpoint
from .compensation import without_probe
from .compiling import CompiledForward
from .config_view import leave_view, use_view
from .copying import Hook
from .decider import Decider
from .decode_cache import cache_indices
from .experts import route_through
from .gathering import store_column_major, store_row_major
from .generation import refuse
from .hooks import Hooks
from .kv_index import disable_kv_index, enable_kv_index
from .learning import Learner
from .open_cut import Shared, Weights
from .per_unit import cut_along
from .policies import PolicyHooks, watch_attention
from .probing import Prober
from .rotary import restore_rotary, rotary_state
from .runtime import Runtime
from .site_cut import SiteCut
from .site_state import SiteBinding, SiteState
from .weights import ModelWatch

Learn = Callable[[SiteCut, Tensor, "Tensor | None"], None]
"""Takes a site, what enters its consumer (B, T, C), and the batch's real tokens (B, T) or None."""


class Engine:
    """A strategy that is installed on a model's sites, until :meth:`remove`.

    The functions that undo it get what they need as arguments, never through a closure: those of a copied model then
    undo what is on the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        sites: list[Site],
        strategy: Strategy,
        trace: list[dict[str, Any]] | None = None,
        all_sites: Sequence[Site] = (),
        runtime: Runtime | None = None,
    ):
        """``sites`` can be cut; ``all_sites`` also contains those of skipped layers."""
        self.model, self.strategy, self.all_sites = model, strategy, tuple(all_sites)
        self.shared = Shared.of(strategy.applier, Runtime() if runtime is None else runtime)
        self.cuts: list[SiteCut] = []
        norms = owned_norms(all_sites or sites)
        for number, site in enumerate(sites):
            binding = SiteBinding.of(site, model, own_norm=site.norm in norms)
            self.cuts.append(SiteCut(number, binding, SiteState(binding, strategy), self.shared))
        found: Any = model.get_submodule(layers)
        self.stack = found
        """The model's own list of its layers."""
        self.layers: list[nn.Module] = list(found)
        self._cache_indices = cache_indices(model, self.layers, self.all_sites or sites)
        self.decoder = model.get_submodule(layers.rpartition(".")[0])
        """The module that owns the layers: one call of it is one batch."""
        self.searched: list[dict[str, Any]] = []
        """What the allocator has recorded of its search, step by step."""
        self.is_suspended = self.is_removed = False
        self._foreign = [
            part for part in (strategy, *dict(strategy).values()) if isinstance(part, Component) and is_foreign(part)
        ]
        self._before = ModelWatch(model) if self._foreign else None
        self._undo: list[Callable[[], Any]] = []
        self._use(strategy, trace)
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _use(self, strategy: Strategy, trace: list[dict[str, Any]] | None) -> None:
        self.strategy, stages = strategy, self.shared.stages
        selector = strategy.probes_with
        prober = None if selector is None else Prober(strategy, selector, stages)
        decider, learner = Decider(strategy, stages), Learner.of(strategy, stages)
        kind = Hooks if strategy.policy.is_plain else PolicyHooks
        self.hooks = kind(self.cuts, self.shared, decider, prober, learner, trace, self._cache_indices[0])

    # Installing and removing.

    def _install(self) -> None:
        hooks, before = self.hooks, dict(with_kwargs=True)
        self._undo.append(partial(restore_rotary, rotary_state(self.model)))
        hooks.installed = True
        self._undo.append(self.hooks.replaced.put_back)
        for cut in self.cuts:
            self._undo.append(cut.close)
            for module, view in cut.binding.views:
                use_view(module, view)
                self._undo.append(partial(leave_view, module, view))
            for linear, producer in cut.binding.producers:
                self._adopt(linear, producer.path, cut, producer)
            if cut.site.router is None:
                self._adopt(cut.binding.consumer, cut.site.consumer, cut)
        self._undo += route_through(self.model, self.cuts, hooks)
        if self.strategy.applier.resizes and any(cut.site.query_heads_per_kv for cut in self.cuts):
            # A model inside another one, which may compute its images' attention in another way.
            hooks.indexes = self.decoder if hasattr(self.decoder, "set_attn_implementation") else self.model
            self._undo.append(partial(disable_kv_index, hooks.indexes))
            enable_kv_index(hooks.indexes)
        learn_parameters([self.decoder, *self.layers, *(cut.binding.entry for cut in self.cuts)])
        self._wrap_decoder()
        self._undo += refuse(self.model, hooks)
        if hasattr(self.model, "save_pretrained"):
            self._warn_on_saving()
        prober, own = hooks.prober, list[Any]()
        if prober is not None:
            own = self.strategy.install(self.model, self.layers, self.all_sites, hooks.padding_of)
        for handle in own:
            self._hook(handle)
        hooks.repeats_steps = not (own or self.strategy.policy.watches)
        # The strategy's hooks need a recomputation's batch in every layer.
        for index in range(len(self.layers)) if own else sorted({cut.site.layer for cut in self.cuts}):
            self._undo.append(partial(restore_checkpoint, self.layers[index]))
            entered = hooks.enter_layer(index, self._cache_indices[index])
            self._hook(self.layers[index].register_forward_pre_hook(entered, **before))
        if prober is not None:
            for cut in self.cuts:
                if cut.site.routed:  # its module decides for all experts of the layer
                    continue
                if cut.binding.norm is not None:
                    self._hook(cut.binding.norm.register_forward_pre_hook(hooks.enter_norm(cut)))
                self._hook(cut.binding.entry.register_forward_pre_hook(hooks.enter_site(cut, prober), **before))
        if self.strategy.policy.watches:
            self._hook(watch_attention(self.model, self.all_sites, hooks))
        for cut in self.cuts if self.shared.applier.resizes else ():
            self._undo += cut_along(cut, self.model)  # after the hook that opens the cut

    def _adopt(self, linear: nn.Linear, path: str, cut: SiteCut, producer: Any = None) -> None:
        linears.adopt(linear, path, cut, producer)
        self._undo.append(partial(linears.release, linear, cut))

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _wrap_decoder(self) -> None:
        own: Any = vars(self.decoder).get("forward")
        forward: Callable = self.decoder.forward
        if self.shared.runtime.compile is not None:
            forward = CompiledForward(self.decoder, forward, self.shared.runtime.compile, self.hooks)
        wrapped = DecoderForward(self.decoder, self.hooks, forward)
        decoder: Any = self.decoder
        decoder.forward = wrapped

        self._undo.append(partial(_unwrap, decoder, wrapped, own))

    def _warn_on_saving(self) -> None:
        model: Any = self.model
        own = vars(model).get("save_pretrained")
        model.save_pretrained = Hook(save_dense, self.hooks, model, own)
        self._undo.append(partial(_put_back, model, "save_pretrained", model.save_pretrained, own))

    def _uninstall(self) -> None:
        self.hooks.installed = False
        while self._undo:  # popped first: after an error, what was undone is not undone again
            self._undo.pop()()
        self.shared.gatherer.release()

    def remove(self) -> None:
        """Remove everything from the model: afterwards it is bit-identical to before, and stays so."""
        with self._lock:  # a batch that passes in another thread ends as it began
            self.shared.running.usual = self.shared.running.applied = "dense"
            self.is_removed = True
            self._uninstall()

    def changed(self) -> str | None:
        """After :meth:`remove`: what has changed on the model while parts of other people ran, and who; else None."""
        before = self._before
        if before is None:
            return None
        found = [*(f"{name} has been written to" for name in before.weights())]
        found += [f"a hook is left at {name or 'the model'}" for name in before.added()]
        if not found:
            return None
        who = ", ".join(map(named, self._foreign))
        return f"the model is not what it was before pruning: {'; '.join(found[:3])}. What ran on it: {who}"

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the model is as it was before, for all threads, and may be pruned by something else."""
        previous = self.shared.running.usual
        with self._lock:
            self._switch("dense")
            self._uninstall()
            self.is_suspended = True
        try:
            yield
        finally:
            with self._lock:
                self.is_suspended = False
                if not self.is_removed:
                    self._install()
                self._switch(previous)

    def freeze(self, kept: Sequence[Tensor]) -> None:
        """Use the same units in all further batches: kept (k,) int64 ascending for each site, in the order of ``cuts``.

        Compensation then uses calibration alone. Raises :class:`SpecError`, and changes nothing, for a compensator
        that needs a probe.
        """
        compensator = without_probe(self.strategy.compensate)
        changes: dict[str, Any] = {"selector": None, "merger": None, "compensate": compensator}
        changes |= {"policy": PerPrompt(), "group_by": OneForAll()}
        with self._lock:
            previous = self.shared.running.usual
            self._switch("dense")
            self._uninstall()
            self._use(self.strategy.model_copy(update=changes), self.hooks.trace)
            for cut, units in zip(self.cuts, kept, strict=True):
                cut.state.fix(None if cut.whole else units)
                cut.compensation.use(compensator)
            self._install()
            self._switch(previous)

    def compute_with(self, weights: Mapping[nn.Module, Weights]) -> None:
        """Prune with these weights of linear layers instead of the model's own, whose dense passes stay what they are.

        Of a layer that is cut: weight and bias in the shape of its fixed units. Of any other: the weight alone, in the
        layer's shape, on its device; raises :class:`SpecError` for another shape.
        """
        layers = {
            cut: (cut.binding.consumer, *(linear for linear, _ in cut.binding.producers))
            for cut in self.cuts
            if not cut.whole
        }
        of_cuts = {linear for linears in layers.values() for linear in linears}
        whole = {linear: weight for linear, (weight, _) in weights.items() if linear not in of_cuts}
        names = {module: name for name, module in self.model.named_modules()}
        for linear, weight in whole.items():
            if (own := linear.get_parameter("weight").shape) != weight.shape:
                rows = " x ".join(map(str, own))
                raise SpecError(
                    f"{names.get(linear, 'a layer')} is whole, and has a weight of {rows}; give one of this shape"
                )
        with self._lock:
            previous = self.shared.running.usual
            self._switch("dense")
            for cut, linears in layers.items():
                cut.state.given = {each: weights[each] for each in linears if each in weights}
            self.hooks.replaced.use(whole)
            self.hooks.forget_weights()
            self._switch(previous)

    # Modes.

    @property
    def decider(self) -> Decider:
        return self.hooks.decider

    @property
    def embeddings(self) -> nn.Embedding:
        """The model's input embeddings."""
        model: Any = self.model
        return model.get_input_embeddings()

    @property
    def mode(self) -> Mode:
        """The mode of this thread's next batch."""
        return self.shared.running.mode

    @property
    def _lock(self) -> threading.RLock:
        return self.shared.running.one_at_a_time.lock

    def start(self) -> None:
        """Prune from now on, in all threads."""
        self._switch("prune")
        for cut in self._cut_per_batch():
            cut.state.prepared(self.strategy.scorer)
        self.hooks.weights.changed()  # from now on

    @contextmanager
    def mode_of(self, mode: Mode) -> Iterator[None]:
        """A context in which this thread runs the model in another mode.

        Outside of a call of the decoder, modules are in the mode that any thread has set last.
        """
        running = self.shared.running
        previous = running.ask(mode)
        self._apply()
        try:
            yield
        finally:
            running.ask(previous)
            self._apply()

    @contextmanager
    def calibrating(self, learn: Learn, cuts: Collection[SiteCut] | None = None) -> Iterator[None]:
        """A context in which ``learn`` gets what enters the consumers of these sites; None: of all."""
        chosen, running = set(self.cuts if cuts is None else cuts), self.shared.running

        def observe(cut: SiteCut, x: Tensor) -> None:
            batch = running.batch
            if batch is not None and cut in chosen:
                with torch.no_grad():
                    learn(cut, *batch.seen(cut.number, x.detach()))

        outer = self.hooks.calibrate_with(observe)
        try:
            with self.mode_of("calibrate"):
                yield
        finally:
            self.hooks.calibrate_with(outer)

    def _switch(self, mode: Mode) -> None:
        """Set the mode of all threads that have asked for no other one."""
        self.shared.running.usual = mode
        self._apply()

    def _apply(self) -> None:
        """Put the modules in the mode of this thread."""
        with self._lock:
            if not (self.is_removed or self.is_suspended):
                self._enter(self.mode)

    def _enter(self, mode: Mode) -> None:
        self.shared.running.applied = mode
        self.hooks.replaced.turn(mode == "prune")
        for cut in self.cuts:
            if mode == "prune" and cut.fixed is not None:
                cut.open(cut.fixed, stays=True)
            elif mode == "dense":
                cut.close()
        if mode == "dense":
            self.shared.gatherer.release()
        if mode == "prune" and self.shared.runtime.column_major and self.shared.selects:
            for cut in self._cut_per_batch():
                if store_column_major(cut.binding.consumer):
                    self._undo.append(partial(store_row_major, cut.binding.consumer))

    def _cut_per_batch(self) -> list[SiteCut]:
        return [cut for cut in self.cuts if not cut.settled] if self.strategy.dynamic else []

    def refresh(self) -> None:
        """Compute and copy anew what was made of the weights."""
        with self._lock:
            self.hooks.forget_weights()

    def histories(self) -> list[ChannelHistory]:
        """Copies of all channel histories, for :meth:`restore`."""
        return [cut.history.clone() for cut in self.cuts]

    def restore(self, histories: list[ChannelHistory] | None) -> None:
        """Restore the channel histories (empty: none), the count of batches, and the random generator."""
        with self._lock:
            for cut, history in zip(self.cuts, histories or (), strict=bool(histories)):
                cut.state.replace_history(history.clone())
            self.hooks.restart()


def _unwrap(decoder: Any, wrapped: DecoderForward, own: Any) -> None:
    """Undo the wrapping of a decoder that had the forward ``own`` on itself, or the class's where it is None."""
    if getattr(decoder, "_old_forward", None) is wrapped:  # accelerate has wrapped it since
        decoder._old_forward = own or type(decoder).forward.__get__(decoder)
    else:
        _put_back(decoder, "forward", wrapped, own)


def _put_back(module: Any, name: str, ours: Any, own: Any) -> None:
    """Undo the setting of a module's attribute to ``ours``: it was ``own``, or the class's where that is None."""
    if vars(module).get(name) is ours:
        delattr(module, name)
        if own is not None:
            setattr(module, name, own)
