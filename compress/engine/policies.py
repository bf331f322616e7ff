"""Policies: which calls of a generation are pruned, and when units are chosen again.

In a prompt with all units nothing is probed: what enters a site's consumer is there for all tokens, and the selector's
tokens among them choose the units of the steps. A step that chooses again probes the tokens since the last decision:
their residual stream is stored with the key/value cache, and their block computes all units for them once more.
Letters: B rows, T positions, D hidden size, C channels; n tokens of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...registry import DataError, ModelError, Site
from ...registry.tensors.caches import without_caches
from .batch import Batch, Decision
from .copying import Hook
from .decode_cache import REMEDY, Seen
from .grouping import decide_in_groups
from .hooks import Hooks
from .probing import MASK, Prober, SiteInput, pick_tokens
from .site_cut import SiteCut


class PolicyHooks(Hooks):
    """The hooks of a strategy with another policy than ``per_prompt``."""

    is_plain: ClassVar[bool] = False

    def begin(self, arguments: dict[str, Any]) -> Batch:
        batch = super().begin(arguments)
        if batch.mode == "prune" and not self.policy.prunes_prompt:
            batch.observe = self.decide_by
        return batch

    def succeed(self, batch: Batch) -> None:
        super().succeed(batch)
        if self.policy.watches and batch.mode == "prune" and batch.cache is not None and batch.output is not None:
            decided = not batch.cached or any(at_site.decision is not None for at_site in batch.sites)
            memory = self.cached.memory(batch.cache) if batch.cached and not batch.is_turn else {}
            memory = self.policy.watch(memory, batch.output, decided)
            self.cached.keep_memory(batch.cache, memory | {"positions": batch.cached + batch.shape[1]})

    def stays(self, cut: SiteCut, batch: Batch) -> bool:
        return super().stays(cut, batch) and (cut.state.fixed is not None or self.policy.prunes_steps)

    def leave(self, cut: SiteCut, batch: Batch) -> None:
        super().leave(cut, batch)
        if batch.mode == "prune" and not self.stays(cut, batch):
            cut.close()

    def by_policy(
        self,
        cut: SiteCut,
        batch: Batch,
        residual: Tensor,
        hidden: Tensor,
        arguments: dict[str, Any],
        prober: Prober,
    ) -> bool:
        if batch.cached and not batch.is_turn:
            if not self.policy.prunes_steps:
                cut.suspend()
                return True
            if self.policy.reads:
                self._decide_again(cut, batch, residual, arguments, prober)
            return False
        if self.policy.prunes_prompt:
            return False
        cut.suspend()
        given = self.input_of(cut, batch, residual, hidden, arguments)
        with torch.no_grad():
            batch.sites[cut.number].selected = given, None if self.groups else prober.select(cut, given)
        return True

    # A prompt with all units.

    @torch.no_grad()
    def decide_by(self, cut: SiteCut, x: Tensor) -> None:
        """Choose the units of the steps by what enters the consumer in a prompt, x (B, T, C) or (B * T, C)."""
        batch, prober = self.shared.running.batch, self.prober
        selected = None if batch is None else batch.sites[cut.number].selected
        if batch is None or prober is None or selected is None:
            return
        at_site, (given, tokens) = batch.sites[cut.number], selected
        at_site.selected = None
        x, valid = batch.seen(cut.number, x.detach())
        if tokens is None:
            decision = decide_in_groups(self.decider, prober, cut, given, x)
        else:
            decision = self.decide(cut, given, prober.probe(cut, given, tokens, pick_tokens(x, *tokens)))
        self._decided(cut, batch, given, decision)
        if self.learner is not None and not batch.cached:
            columns = torch.arange(x.shape[-1], device=x.device)
            at_site.learnt = self.learner.observe(cut, columns, x, valid, batch.checks)

    def _decided(self, cut: SiteCut, batch: Batch, given: SiteInput, decision: Decision) -> None:
        decision = batch.sites[cut.number].decision = decision._replace(positions=decision.positions + given.start)
        cut.computed = decision.kept
        if batch.cache is not None:
            decided = decision.kept, decision.probe_mean, decision.shares
            self.cached.remember(batch.cache, batch.layer, cut.site, decided)
        if self.trace is not None and not batch.passed:
            self.record(cut, decision, batch)

    # A step that may choose again.

    def _decide_again(
        self, cut: SiteCut, batch: Batch, residual: Tensor, arguments: dict[str, Any], prober: Prober
    ) -> None:
        """Note the step's token (B, 1, D), and choose units by the tokens since the last decision if it is time."""
        cache, position = batch.cache, batch.cached
        seen = self.note(cut, batch, residual, arguments)
        decided = self.cached.since(cache, batch.layer, cut.site)[0]
        if not self.policy.again(position + 1 - decided, self.cached.memory(cache)):
            return
        _, tokens, called = zip(*seen, strict=True)
        states = torch.cat(tokens, 1)
        given = SiteInput(batch, states, None, None, joined(called, states), start=position + 1 - len(seen))
        self._decided(cut, batch, given, self.decide(cut, given, prober.probe(cut, given)))
        self.cached.decided_at(cache, batch.layer, cut.site, position + 1)

    def note(self, cut: SiteCut, batch: Batch, residual: Tensor, arguments: dict[str, Any]) -> list[Seen]:
        """Store a step's token (B, 1, D); returns the tokens that a decision would read."""
        cache, position, memory = batch.cache, batch.cached, self.cached.memory(batch.cache)
        decided, seen = self.cached.since(cache, batch.layer, cut.site)
        if position < decided or memory.get("positions", position) != position:
            raise DataError(
                f"{cut.site.label}: the key/value cache was cropped to {position} positions, and policy "
                f"{self.policy.name} has read later ones; {REMEDY}"
            )
        residual = residual.detach().to(cut.state.history.device).reshape(batch.shape[0], 1, -1).clone()
        seen[:] = [each for each in seen if each[0] < position and len(each[1]) == len(residual)]
        seen.append((position, residual, without_caches(arguments)))
        del seen[: -self.policy.reads]
        return seen


def joined(calls: Sequence[dict[str, Any]], states: Tensor) -> dict[str, Any]:
    """The arguments of one call with all tokens, states (B, n, D), from those of n calls with one token each.

    A token attends to those before it, and to nothing else of the cache. Raises :class:`ModelError` for a tensor that
    is not known to be of one token.
    """

    def part(name: str, values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, (tuple, list)):  # cosines and sines
            return type(first)(part(name, each) for each in zip(*values, strict=True))
        if not isinstance(first, Tensor) or not first.dim():
            return values[-1]
        place = next((place for place in (1, 0) if first.dim() > place and first.shape[place] == 1), None)
        if place is None:
            raise ModelError(
                f"a block is called with {name} {tuple(first.shape)} in a decode step, and how tokens follow each "
                "other in it is not known; use policy: per_prompt"
            )
        return torch.cat(list(values), place)

    made = {name: part(name, [call[name] for call in calls]) for name in calls[-1] if name != MASK}
    if MASK in calls[-1]:
        hidden = torch.full((len(calls), len(calls)), torch.finfo(states.dtype).min, device=states.device)
        made[MASK] = hidden.to(states.dtype).triu(1)[None, None]
    return made


def watch_attention(model: nn.Module, sites: Sequence[Site], hooks: Hooks) -> Any:
    """Have every batch note the mean output of the last attention; returns the handle of a forward hook.

    Raises :class:`ModelError` for a model without an attention that is known.
    """
    known = [site for site in sites if site.kind == "attention"]
    if not known:
        raise ModelError(
            f"policy {hooks.policy.name} watches the output of the last attention, and no site of this model is an "
            "attention; use policy: every_n"
        )
    return model.get_submodule(known[-1].consumer).register_forward_hook(Hook(_note_output, hooks))


def _note_output(hooks: Hooks, module: nn.Module, args: tuple, output: Tensor) -> None:
    """Note the mean over the batch's real tokens of an output (B, T, D) or (B * T, D), outside of probes.

    The tokens of a step are all real: its mask, where it is one of all keys, does not tell.
    """
    batch = hooks.shared.running.batch
    if batch is None or batch.mode != "prune" or (batch.probe is not None and batch.probe.is_running):
        return
    states, valid = output.detach().reshape(-1, output.shape[-1]).float(), None
    if not batch.cached or batch.is_turn:
        valid = batch.valid_on(output.device)
    batch.output = (states if valid is None else states[valid.reshape(-1)]).mean(0)
