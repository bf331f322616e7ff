"""What happens to the routed experts of a layer while a batch passes.

**Which sites.** Every routed expert is a site of its own, of kind ``expert3``: its channels are those of a small MLP.
Strategies, scorers, allocators, histories, masks and compensation treat it as any other MLP. The engine reads the
expert's matrices as linear layers (:class:`~prunekit.registry.ExpertLinear`), which are views of the 3-D tensors, so
that no weight moves. With ``experts: whole`` a layer's experts are one site of kind ``experts`` instead: its units are
the experts.

**Which tokens.** The module of the experts is called with all tokens of the batch and with what the router chose for
each of them. It is run here expert by expert. What enters an expert's consumer is (n, I) for the n tokens that reach
it. Statistics see the real ones among them as a batch of n rows with one position, (n, 1, I): positions are pooled, so
that the history of 128 experts of 768 channels takes 0.4 MB a layer, and not 400 MB as with 1,024 positions. With
``router_weights`` each token is multiplied by the router's weight first.

**Decisions per batch.** The selector picks the probe's tokens once for all experts of a layer. They are routed as the
router says: an expert's probe are the chosen tokens that reach it. An expert that none reaches is decided by its
history. With a key/value cache every expert is decided with the prompt, also one that no token reaches: a later token
may.

**Experts that calibration never reached** are scored by weights alone (:mod:`~prunekit.compress.calibration.experts`).

**Whole experts** go with their rows of the router. Its tensors with an entry for each expert, and its counts of
experts, are cut while the block runs, and are whole outside of it; the router then chooses among the experts that are
left.

Letters: N = B * T tokens of the batch, k experts chosen for each; n tokens of one expert, D hidden size, I channels of
an expert, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...registry import ModelError
from ...registry.tensors.experts import activated, count_of, cut_router, normed, plain_expert
from .batch import Batch, ProbeRun
from .copying import Unpickled
from .hooks import Hooks
from .probing import Prober, SiteInput
from .site_cut import SiteCut


class Chosen(NamedTuple):
    """The probe of a layer's experts."""

    rows: Tensor
    """(b,) int64 ascending."""
    positions: Tensor
    """(t,) or (b, t) int64 ascending."""
    tokens: Tensor
    """(N,) bool: the real tokens among them."""


class RoutedExperts(Unpickled):
    """Replaces the forward of the module that holds a layer's experts."""

    def __init__(self, module: Any, cuts: Sequence[SiteCut], hooks: Hooks, forward: Callable):
        self.module, self.cuts, self.hooks, self.forward = module, list(cuts), hooks, forward
        self.whole = cuts[0] if cuts[0].site.expert is None else None
        """The site, where its units are whole experts."""
        self.cut_of = {cut.site.expert: cut for cut in cuts}
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:4]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = self.hooks.shared.running.batch
        if not self._differs(batch):
            return self.forward(*args, **kwargs)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        hidden, index, weights = (arguments[name] for name in self.names)
        states = hidden.reshape(-1, hidden.shape[-1])
        if batch is not None and len(states) != batch.shape[0] * batch.shape[1]:
            raise ModelError(
                f"{self.cuts[0].site.label}: {self.cuts[0].site.entry} got {len(states)} tokens of a batch of "
                f"{batch.shape[0]} x {batch.shape[1]}, so it is not known which; leave experts out (experts: keep)"
            )
        if weights.shape != index.shape:
            weights = weights.gather(1, index)
        return self._run(states, index, weights, batch).view_as(hidden)

    def _differs(self, batch: Batch | None) -> bool:
        """Whether an expert is cut, is observed, or has hooks on its views."""
        if any(cut.open_cut is not None for cut in self.cuts):
            return True
        if batch is None or batch.mode == "dense":
            consumers = [cut.binding.consumer for cut in self.cuts]
            return any(consumer._forward_hooks or consumer._forward_pre_hooks for consumer in consumers)
        return batch.mode == "calibrate" or not all(cut.whole for cut in self.cuts)

    def _run(self, states: Tensor, index: Tensor, weights: Tensor, batch: Batch | None) -> Tensor:
        """The experts' output (N, D); states (N, D), index and weights (N, k)."""
        flat, made, start = weights.reshape(-1), torch.zeros_like(states), 0
        order, kept = index.reshape(-1).argsort(stable=True), self._kept
        chosen = None if batch is None else self._probe(batch, states)
        observed = None
        if self.whole is not None and batch is not None and batch.observe is not None:
            observed = states.new_zeros(len(states), 2, count_of(self.module), dtype=torch.float32)
        for place, count in enumerate(torch.bincount(index.reshape(-1), minlength=len(kept)).tolist()):
            slots = order[start : start + count]
            start += count
            tokens, weight = slots // index.shape[1], flat[slots]
            x = states.index_select(0, tokens)
            if self.whole is None:
                output = self._expert(self.cut_of[place], x, tokens, weight, chosen, batch)
            else:
                output = plain_expert(self.module, kept[place], x)
            if observed is not None:
                observed[tokens, 0, kept[place]] = weight.detach().float()
                observed[tokens, 1, kept[place]] = output.detach().float().norm(dim=-1)
            if count:
                made.index_add_(0, tokens, (output * weight[:, None]).to(made.dtype))
        if self.whole is not None and batch is not None:
            at_site = batch.sites[self.whole.number]
            at_site.read.add(self.whole.binding.consumer)
            if observed is not None and batch.observe is not None:
                at_site.tokens = torch.arange(len(states), device=states.device)
                batch.observe(self.whole, observed)
        return made

    @property
    def _kept(self) -> list[int]:
        """The experts that the router's choices count through."""
        if self.whole is None or self.whole.kept is None:
            return list(range(count_of(self.module)))
        return self.whole.kept.tolist()

    # One expert.

    def _expert(
        self, cut: SiteCut, x: Tensor, tokens: Tensor, weight: Tensor, chosen: Chosen | None, batch: Batch | None
    ) -> Tensor:
        """What an expert makes of its tokens x (n, D); (n, D)."""
        if batch is not None:
            at_site, binding = batch.sites[cut.number], cut.binding
            at_site.read.update([binding.consumer, *(linear for linear, _ in binding.producers)])
            at_site.tokens = tokens
            at_site.weights = weight.float() if cut.state.router_weights else None
            if chosen is not None or batch.cached:
                self._decide(cut, x, chosen, batch)
        output = normed(self.module, self._consumed(cut, x)) if len(x) else x
        if batch is not None:
            self.hooks.leave(cut, batch)
        return output

    def _consumed(self, cut: SiteCut, x: Tensor) -> Tensor:
        """The consumer's output (n, D)."""
        (producer, _), *_ = cut.binding.producers
        return cut.binding.consumer(activated(self.module, producer(x)))

    # Decisions per batch.

    def _probe(self, batch: Batch, states: Tensor) -> Chosen | None:
        """The probe's tokens; None where nothing is decided from one."""
        hooks, first = self.hooks, self.cuts[0]
        if batch.mode != "prune" or hooks.prober is None or all(cut.settled for cut in self.cuts):
            return None
        if first.number:
            hooks.leave(hooks.cuts[first.number - 1], batch)
        at_site = batch.sites[first.number]
        residual, at_site.residual = at_site.residual, None
        if batch.cached:
            return None
        if residual is None:
            if first.binding.norm is not None:
                raise hooks.no_norm(first)
            residual = states
        given = hooks.input_of(first, batch, residual, states, {})
        with torch.no_grad():
            rows, positions = hooks.prober.select(first, given)
            places = (rows[:, None] * batch.shape[1] + positions).reshape(-1)
            tokens = torch.zeros(len(states), dtype=torch.bool, device=states.device).index_fill_(0, places, True)
        return Chosen(rows, positions, tokens if given.valid is None else tokens & given.valid.reshape(-1))

    def _decide(self, cut: SiteCut, x: Tensor, chosen: Chosen | None, batch: Batch) -> None:
        """Open the cut of one expert for its tokens x (n, D)."""
        hooks, at_site = self.hooks, batch.sites[cut.number]
        if cut.settled or hooks.prober is None:
            return
        known = None if batch.cache is None else hooks.cached.of(batch.cache, batch.layer, cut.site)
        if known is not None:
            cut.open(*known, stays=True)
            return
        if chosen is None or (not len(x) and batch.cache is None):
            return
        decision = at_site.decision
        if decision is None:
            decision = at_site.decision = self._decision(cut, x, chosen, batch, hooks.prober)
        decided = decision.kept, decision.probe_mean, decision.shares
        cut.open(*decided, stays=hooks.stays(cut, batch))
        if batch.cache is not None:
            hooks.cached.remember(batch.cache, batch.layer, cut.site, decided)
        if hooks.trace is not None and not batch.passed:
            hooks.record(cut, decision, batch)

    @torch.no_grad()
    def _decision(self, cut: SiteCut, x: Tensor, chosen: Chosen, batch: Batch, prober: Prober) -> Any:
        at_site = batch.sites[cut.number]
        assert at_site.tokens is not None  # set where the expert was entered
        mine = chosen.tokens[at_site.tokens]
        weights = None if at_site.weights is None else at_site.weights[mine]
        probe = prober.probe_of(cut, self._states(cut, x[mine], batch), weights, batch)
        decision = self.hooks.decide(cut, SiteInput(batch, x[:, None], x[:, None], None, {}), probe)
        return decision._replace(rows=chosen.rows, positions=chosen.positions)

    def _states(self, cut: SiteCut, x: Tensor, batch: Batch) -> Tensor:
        """What enters the consumer for tokens x (n, D), all channels kept; (n, I)."""
        cut.suspend()
        probe = batch.probe = ProbeRun(None, None)
        try:
            self._consumed(cut, x)
        finally:
            probe.is_running = False
        assert probe.states is not None  # the consumer was called
        return probe.states


class RoutedBlock(Unpickled):
    """Replaces the forward of the block with router and experts: the router chooses among the experts that are left."""

    def __init__(self, block: nn.Module, router: nn.Module, cut: SiteCut, forward: Callable):
        self.block, self.router, self.cut, self.forward = block, router, cut, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kept = self.cut.kept
        if kept is None:
            return self.forward(*args, **kwargs)
        with cut_router(self.block, self.router, self.cut.site.units, kept):
            return self.forward(*args, **kwargs)


def route_through(model: nn.Module, cuts: Sequence[SiteCut], hooks: Hooks) -> list[Callable[[], Any]]:
    """Run the experts of all layers expert by expert; returns functions that undo it."""
    undo: list[Callable[[], Any]] = []
    routed = [cut for cut in cuts if cut.site.routed]
    for _, group in groupby(routed, lambda cut: cut.site.entry):
        mine = list(group)
        site, module = mine[0].site, mine[0].binding.entry
        undo.append(_put(module, site.entry, partial(RoutedExperts, module, mine, hooks)))
        if site.router is not None:
            block, router = model.get_submodule(site.entry.rpartition(".")[0]), model.get_submodule(site.router)
            undo.append(_put(block, site.entry, partial(RoutedBlock, block, router, mine[0])))
        elif hooks.prober is not None and mine[0].binding.norm is not None:
            undo.append(mine[0].binding.norm.register_forward_pre_hook(hooks.enter_norm(mine[0])).remove)
    return undo


def _put(module: nn.Module, path: str, made: Callable[[Callable], Any]) -> Callable[[], Any]:
    """Have ``module`` call what is made of its forward; returns a function that undoes it."""
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"  # accelerate keeps what it wrapped
    own = vars(module).get(name)
    if isinstance(own, (RoutedExperts, RoutedBlock)):
        raise ModelError(f"{path} is already part of a pruned model; call remove() on that one first")
    ours = vars(module)[name] = made(own or type(module).forward.__get__(module))
    return partial(_take_off, module, name, ours, own)


def _take_off(module: nn.Module, name: str, ours: Any, own: Any) -> None:
    if vars(module).get(name) is ours:
        del vars(module)[name]
        if own is not None:
            vars(module)[name] = own
