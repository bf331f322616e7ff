"""The hooks of a pruned model, in the order in which a batch meets them.

They find the batch through :class:`~.batch.Running`, and everything that they need through their own arguments, never
through a closure: a copy of the model then gets hooks, state and batches of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...registry import DataError, ModelError
from ...registry.tensors.caches import cache_among, is_other_cache
from .absent import count_tokens
from .ahead import SideStreams, following_sites
from .batch import Batch, Decision, Mode, Observe, Running, named, split, valid_tokens, worth_reusing
from .checkpointing import check_not_again, use_checkpoint
from .copying import Hook
from .decider import Decider
from .decode_cache import CacheDecisions, Seen, own_cache
from .grouping import decide_in_groups
from .kv_index import enable_kv_index
from .learning import Learner, commit
from .open_cut import Shared
from .probing import Probe, Prober, SiteInput
from .site_cut import SiteCut
from .steady import Steady
from .weights import ReplacedWeights, WeightsWatch


class Hooks:
    """What happens to a batch, step by step."""

    is_plain: ClassVar[bool] = True
    """Whether the prompt's decision serves the prompt and its steps."""

    def __init__(
        self,
        cuts: Sequence[SiteCut],
        shared: Shared,
        decider: Decider,
        prober: Prober | None,
        learner: Learner | None,
        trace: list[dict[str, Any]] | None,
        first: int,
    ):
        """``first`` is the index in a key/value cache of the layer that runs first."""
        self.cuts, self.shared, self.trace = cuts, shared, trace
        self.decider, self.prober, self.learner = decider, prober, learner
        self.policy, self.groups = decider.strategy.policy, decider.strategy.group_by.splits
        self.installed = False
        """Whether the engine has put them on the model."""
        self.repeats_steps = False
        """Whether decode steps may leave out what they find as in the step before: no other hooks are installed."""
        self._steady: Steady | None = None
        self.indexes: Any = None
        """The model, where its attention reads key/value heads by index."""
        self._batches = 0
        self._calibration: Observe | None = None
        self._following = following_sites(cuts) if decider.strategy.decides_ahead else [None] * len(cuts)
        self.cached = CacheDecisions(decider.strategy, cuts, first)
        self._side = SideStreams(shared.runtime.overlap)
        self.weights, self.replaced = WeightsWatch(cuts), ReplacedWeights()

    def calibrate_with(self, observe: Observe | None) -> Observe | None:
        """Set the function that gets every consumer's input in calibration; returns the previous one."""
        outer, self._calibration = self._calibration, observe
        return outer

    @property
    def depends_on_batch(self) -> bool:
        """Whether units, or the means that compensate for them, depend on the batch."""
        return self.prober is not None and not all(cut.settled for cut in self.cuts)

    # The decoder.

    def begin(self, arguments: dict[str, Any]) -> Batch:
        """A batch begins: the decoder was called with these arguments."""
        if self.indexes is not None and self.installed and not torch.compiler.is_compiling():
            enable_kv_index(self.indexes)
        mode, observe = self.shared.running.mode if self.installed else "dense", None
        tokens = arguments["inputs_embeds"] if arguments.get("input_ids") is None else arguments["input_ids"]
        rows, length = tokens.shape[:2]
        if mode == "prune" and self._steady is not None:
            if cached := self._steady.again(arguments, (rows, length), self.policy):
                batch = Batch(mode, (rows, length), None, len(self.cuts) if self.policy.reads else 0, steady=True)
                batch.cached, batch.cache = cached, cache_among(arguments)
                batch.before = self.cached.before_step(batch.cache, cached)
                return batch
            self._steady = None  # it holds the copies of weights that this batch may replace
        if mode == "calibrate":
            observe = self._calibration
        elif mode == "prune" and self.learner is not None:
            observe = self.learn
        if mode == "prune" and self.depends_on_batch:
            check_not_again()
        counts = mode == "calibrate" or (mode == "prune" and self.prober is not None)
        valid = valid_tokens(arguments.get("attention_mask"), rows, length) if counts else None
        batch = Batch(mode, (rows, length), valid, len(self.cuts), observe)
        if self.prober is not None and not torch.compiler.is_compiling():
            batch.generator = self.prober.generator.clone_state()
        if (cache := cache_among(arguments)) is not None:
            batch.before = self.cached.before(cache)
        return batch

    def succeed(self, batch: Batch) -> None:
        """The batch has passed: write the updated histories, and what it leaves to the next one."""
        if batch.steady:
            return
        self._side.join()
        self.check_read(batch)
        with torch.no_grad():
            commit(batch, self.cuts, self.shared.stages, self.prober)
        if self.trace is not None and batch.records:
            self.trace += batch.records
            self._batches += 1
        if self.repeats_steps and batch.mode == "prune" and batch.cached and batch.shape[1] == 1:
            self._steady = Steady.after(self.cuts, batch)

    def fail(self, batch: Batch) -> None:
        """The batch has failed: its cache is as before, or refused from now on."""
        self._steady = None
        if batch.before is not None:
            # Layers without sites have no hooks: whether one of them has begun is known of the first layer alone.
            knows = not batch.steady and any(cut.site.layer == 0 for cut in self.cuts[:1])
            self.cached.failed(batch.before, refused=knows and not any(each.entered for each in batch.sites))

    def end(self, batch: Batch) -> None:
        """The batch has ended, with or without an error."""
        if batch.steady:
            return
        self._side.join()
        self.leave_all(batch)
        batch.close()

    # A layer, and its sites.

    def enter_layer(self, place: int, index: int) -> Callable:
        """A layer begins; it has an index of its own in a key/value cache."""
        mine = [cut for cut in self.cuts if cut.site.layer == place]

        def hook(
            hooks: Hooks, mine: list[SiteCut], index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
        ) -> None:
            batch = hooks.shared.running.batch
            if batch is not None and batch.steady:
                batch.layer = index
            elif batch is not None:
                arguments, pruning = named(layer, args, kwargs), batch.mode == "prune"
                decides = hooks.prober is not None and not all(cut.settled for cut in mine)
                if pruning and decides:
                    hooks.check_cache(index, arguments)
                batch.cache, batch.layer, batch.cached = cache_among(arguments), index, 0
                if batch.cache is not None:
                    batch.cached = hooks.cached.enter(batch.cache, index, batch.shape[1], pruning, decides)
                    if any(cut.absent and cut.site.kind == "attention" for cut in mine):
                        count_tokens(own_cache(batch.cache), index, split(layer, args, kwargs)[0])
                is_step = batch.cached and batch.shape[1] == 1
                batch.is_turn = bool(batch.cached) and not is_step and hooks.decider.strategy.turns == "decide"
                if mine and mine[0].number == 0 and pruning and not is_step:
                    hooks.check_weights()
                for cut in mine:
                    batch.sites[cut.number].entered = True
                if layer.training and torch.is_grad_enabled():
                    use_checkpoint(layer, hooks.shared.running, hooks.again)

        return Hook(hook, self, mine, index)

    def enter_norm(self, cut: SiteCut) -> Callable:
        """A site's norm reads the residual stream."""

        def hook(running: Running, number: int, norm: nn.Module, args: tuple) -> None:
            if running.batch is not None and running.batch.sites:
                running.batch.sites[number].residual = args[0]

        return Hook(hook, self.shared.running, cut.number)

    def enter_site(self, cut: SiteCut, prober: Prober) -> Callable:
        """A block is about to read the normed states: its cut is decided, and opened."""

        def hook(
            hooks: Hooks, cut: SiteCut, prober: Prober, module: nn.Module, args: tuple, kwargs: dict[str, Any]
        ) -> None:
            batch = hooks.shared.running.batch
            if batch is None:
                hooks.check_no_batch(cut)
                return
            if batch.mode != "prune" or (batch.steady and (cut.settled or not batch.sites)):
                return
            if cut.number and not batch.steady:
                hooks.leave(hooks.cuts[cut.number - 1], batch)
            at_site = batch.sites[cut.number]
            residual, at_site.residual = at_site.residual, None
            hidden, arguments = split(module, args, kwargs)
            if residual is None:
                if cut.binding.norm is not None:
                    raise hooks.no_norm(cut)
                residual = hidden
            if batch.steady:
                hooks.note(cut, batch, residual, arguments)
                return
            if not cut.settled:
                if not hooks.is_plain and hooks.by_policy(cut, batch, residual, hidden, arguments, prober):
                    return
                known = None if batch.cache is None else hooks.cached.of(batch.cache, batch.layer, cut.binding.site)
                if known is not None:
                    cut.open(*known, stays=True)
                    return
                decision = at_site.decision
                if decision is None:
                    given = hooks.input_of(cut, batch, residual, hidden, arguments)
                    decision = hooks.decided(cut, given, prober)
                    if batch.is_turn:
                        decision = decision._replace(positions=decision.positions + given.start)
                    at_site.decision = decision
                else:
                    hooks._side.join()
                decided = decision.kept, decision.probe_mean, decision.shares
                cut.open(*decided, stays=hooks.stays(cut, batch))
                if batch.cache is not None:
                    hooks.cached.remember(batch.cache, batch.layer, cut.binding.site, decided)
                if hooks.trace is not None and not batch.passed:
                    hooks.record(cut, decision, batch)
            following = hooks._following[cut.number]
            if following is not None and not batch.passed:
                hooks.decide_ahead(cut, following, batch, residual, arguments, prober)

        return Hook(hook, self, cut, prober)

    def by_policy(
        self,
        cut: SiteCut,
        batch: Batch,
        residual: Tensor,
        hidden: Tensor,
        arguments: dict[str, Any],
        prober: Prober,
    ) -> bool:
        """Whether another policy than ``per_prompt`` has a site compute all units in this call."""
        return False

    def note(self, cut: SiteCut, batch: Batch, residual: Tensor, arguments: dict[str, Any]) -> list[Seen]:
        """Store a step's token, where the policy reads tokens of steps."""
        return []

    def input_of(
        self, cut: SiteCut, batch: Batch, residual: Tensor, hidden: Tensor, arguments: dict[str, Any]
    ) -> SiteInput:
        """What the site's block is about to read, on the device where its history is."""
        state, device = cut.state, cut.state.history.device
        hidden = hidden.to(device).reshape(*batch.shape, hidden.shape[-1])
        residual = residual.to(device).reshape(*batch.shape, residual.shape[-1])
        reuse = self.shared.reuses and state.fixed is None and worth_reusing(hidden)
        return SiteInput(batch, residual, hidden, batch.valid_on(device), arguments, reuse, start=batch.cached)

    def decided(self, cut: SiteCut, given: SiteInput, prober: Prober) -> Decision:
        """Probe, and decide for all rows or for groups of them."""
        if self.groups:
            return decide_in_groups(self.decider, prober, cut, given)
        return self.decide(cut, given, prober.probe(cut, given))

    def decide(self, cut: SiteCut, given: SiteInput, probe: Probe) -> Decision:
        """Decide by the result of a probe; a site whose units are decided once is probed for compensation alone."""
        fixed = cut.state.fixed
        if fixed is None:
            decision = self.decider.decide(cut, given, probe)
        else:
            decision = Decision(fixed, probe.rows, probe.positions, probe.mean)
        if probe.states is None or probe.mean is None:
            return decision
        opened_next = cut.cut_to(decision.kept, self.stays(cut, given.batch))
        return decision._replace(shares=opened_next.best_shares(probe.states, probe.real, probe.mean))

    def stays(self, cut: SiteCut, batch: Batch) -> bool:
        """Whether a cut of this batch serves several passes."""
        return cut.state.fixed is not None or batch.cache is not None

    def decide_ahead(
        self,
        cut: SiteCut,
        following: SiteCut,
        batch: Batch,
        residual: Tensor,
        arguments: dict[str, Any],
        prober: Prober,
    ) -> None:
        """Decide for the next site from what this one is about to read."""
        if cut.binding.site.kind == "attention":
            batch.attention_arguments = arguments
        if following.settled or batch.cached or residual.device != following.history.device:
            return  # in a decode step its cut goes with the cache
        residual = residual.reshape(*batch.shape, residual.shape[-1])
        theirs = batch.attention_arguments if following.binding.site.kind == "attention" else {}
        given = SiteInput(batch, residual, None, batch.valid_on(residual.device), theirs)
        with self._side.work(residual):
            decision = self.decide(following, given, prober.probe(following, given))
            batch.sites[following.number].decision = decision
            if self._side.used and following.fixed is None and not self.shared.runtime.fused_gather:
                following.copy_ahead(decision.kept, batch.cache is not None)
        if self._side.used:
            self._side.share(decision.kept, decision.probe_mean, decision.shares)

    def learn(self, cut: SiteCut, x: Tensor) -> None:
        """Compute a site's updated history from its consumer's input, (B, T, c) or (B * T, c), for :func:`commit`."""
        batch, open_cut, learner = self.shared.running.batch, cut.open_cut, self.learner
        if batch is None or learner is None or open_cut is None or batch.cached or not len(open_cut.kept):
            return
        with torch.no_grad(), self._side.work(x):
            x, valid = batch.seen(cut.number, x.detach())
            if not len(x):  # no real token reaches this expert
                return
            learnt = batch.sites[cut.number].learnt = learner.observe(cut, open_cut.columns, x, valid, batch.checks)
        if self._side.used and learnt is not None:
            self._side.share(*learnt)

    def leave(self, cut: SiteCut, batch: Batch) -> None:
        """Close a site's cut that is not used again: one made for this batch, without a key/value cache."""
        if batch.cache is None and batch.mode == "prune" and cut.state.fixed is None:
            cut.close()

    def leave_all(self, batch: Batch) -> None:
        """Close the cuts of all sites that are not used again."""
        for cut in self.cuts:
            self.leave(cut, batch)

    @contextmanager
    def again(self, batch: Batch) -> Iterator[None]:
        """Within it a batch that has passed is run again, in the mode that it had.

        Raises :class:`ModelError` where the pruning that it ran with has been removed or frozen since.
        """
        if not self.installed and batch.mode == "prune":
            raise ModelError(
                "this backward pass runs layers again (gradient checkpointing) of a forward pass that was pruned, and "
                "that pruning is no longer on the model; run the backward pass before remove(), freeze() and "
                "suspended()"
            )
        with self.turned(batch.mode):
            try:
                yield
            finally:
                self.leave_all(batch)

    def turned(self, mode: Mode) -> AbstractContextManager[None]:
        """Within it the sites are what a pass in this mode expects, whatever mode another thread has asked for."""
        return nullcontext() if mode == self.shared.running.applied else self._turned(mode)

    @contextmanager
    def _turned(self, mode: Mode) -> Iterator[None]:
        before, replaced = [cut.open_cut for cut in self.cuts], self.replaced.are_put
        try:
            self.replaced.turn(mode == "prune")
            for cut in self.cuts:
                if cut.fixed is not None and mode == "prune":
                    cut.open(cut.fixed, stays=True)
                else:
                    cut.suspend()
            yield
        finally:
            self.replaced.turn(replaced)
            for cut, open_cut in zip(self.cuts, before, strict=True):
                cut.reopen(open_cut)

    def check_no_batch(self, cut: SiteCut) -> None:
        """Raise :class:`ModelError` for a block that runs outside of its decoder although it is cut per batch."""
        if self.shared.running.mode == "prune" and not cut.whole and cut.fixed is None:
            raise ModelError(
                f"{cut.site.label} runs outside of a call of its decoder, and this pruning decides per batch of the "
                "decoder; call the whole model, or run this inside pruned.dense()"
            )

    def check_cache(self, layer: int, arguments: dict[str, Any]) -> None:
        """Raise :class:`DataError` for a key/value cache that cannot carry decisions."""
        for name, value in arguments.items():
            if is_other_cache(name, value):
                raise DataError(
                    f"layer {layer}: the key/value cache {name} is a {type(value).__name__}, which cannot store the "
                    "units that were chosen from its prompt; use a transformers Cache, or use_cache=False"
                )

    def check_read(self, batch: Batch) -> None:
        """Raise :class:`ModelError` where a block has computed without its linear layers: a cut there would be without
        effect, and nothing could be learnt of it."""
        cuts = [cut for cut in self.cuts if batch.mode == "calibrate" or not cut.whole]
        if batch.mode == "dense" or not cuts:
            return
        if not any(at_site.entered for at_site in batch.sites):
            raise ModelError(
                f"the layers were not called as modules in this batch, so that nothing of {cuts[0].site.label} ran as "
                "it is cut: the decoder's forward was replaced; undo that, or load the model again"
            )
        for cut in cuts:
            if batch.sites[cut.number].entered and not cut.absent:
                cut.binding.check_read(batch.sites[cut.number].read)

    def no_norm(self, cut: SiteCut) -> ModelError:
        """The error for a block that runs without the norm that its site names."""
        return ModelError(
            f"{cut.site.label}: {cut.site.entry} was called before its norm {cut.site.norm}; correct the site's norm "
            "in the architecture"
        )

    def record(self, cut: SiteCut, decision: Decision, batch: Batch | None) -> None:
        """Add a decision to the trace, where one is kept, group by group; no ``batch`` for decisions made once."""
        if self.trace is None:
            return
        for rows, part in decision.groups:
            self.record(cut, part, batch)
            (self.trace if batch is None else batch.records)[-1]["group"] = rows.tolist()
        if decision.groups:
            return
        number = None if batch is None else self._batches
        where = {"batch": number, "layer": cut.site.layer, "kind": cut.site.kind}
        seen = {name: getattr(decision, name).tolist() for name in ("kept", "rows", "positions")}
        if decision.shares is not None:
            seen |= zip(("mean_share", "slope_share"), decision.shares.tolist(), strict=True)
        (self.trace if batch is None else batch.records).append(where | seen)

    def check_weights(self) -> None:
        """Forget what was made of weights that have changed since. A decode step uses what its prompt used."""
        if not torch.compiler.is_compiling() and self.weights.changed():
            self.forget_weights()

    def forget_weights(self) -> None:
        """Compute and copy anew what was made of the weights."""
        self._steady = None
        for cut in self.cuts:
            cut.forget_weights()

    @torch.no_grad()
    def refresh(self) -> None:
        """Renew what was computed from weights that have changed since: compiled code does not check it."""
        self.check_weights()
        for cut in self.cuts:
            cut.refresh()
            if self.decider.strategy.dynamic and not cut.settled:
                cut.state.prepared(self.decider.strategy.scorer)

    def restart(self) -> None:
        """Count batches from 0 again, and restart the random generator."""
        self._batches = 0
        if self.prober is not None:
            self.prober.restart()

    def padding_of(self, states: Tensor) -> Tensor | None:
        """Padded tokens (b, t) of the batch, or of the probe while one runs; None where all are real."""
        batch = self.shared.running.batch
        if batch is None or batch.mode != "prune":
            return None
        probe = batch.probe
        valid = probe.valid if probe is not None and probe.is_running else batch.valid_on(states.device)
        return None if valid is None else ~valid
