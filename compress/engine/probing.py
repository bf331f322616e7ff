"""Running a site's first half on a probe, by the block's own forward.

Letters: B rows of the batch, T its positions, D hidden size, C channels; b, t: the probe's rows and positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...registry import ModelError, PluginError, ProbeSelector, Site, Strategy, position_sums
from ...registry.catalog import is_foreign, named
from ...registry.tensors.caches import without_caches
from .batch import PROBED, Batch, ProbeProducts, ProbeRun
from .runtime import Stages
from .shapes import check_picks, checked
from .site_cut import SiteCut

MASK = "attention_mask"


@dataclass(eq=False)
class SiteInput:
    """What a site's block reads now, or will read next if it is decided ahead."""

    batch: Batch
    residual: Tensor
    """(B, T, D): the residual stream, before the site's norm."""
    hidden: Tensor | None
    """(B, T, D): the same normed; None where no norm has read it yet."""
    valid: Tensor | None
    """(B, T) bool: real tokens; None where all are."""
    arguments: dict[str, Any]
    """What else the block's forward is called with."""
    reuse: bool = False
    """Whether the batch reuses what the producers compute for the probe."""
    start: int = 0
    """Position of the first token; more than 0 for tokens of decode steps."""
    generator: torch.Generator | None = None
    """What a random selector draws from; None: from the batch's."""

    def normed(self, cut: SiteCut) -> Tensor:
        """(B, T, D): the normed states."""
        return cut.binding.normed(self.residual) if self.hidden is None else self.hidden


@dataclass(eq=False)
class Probe:
    """The result of a probe of one site."""

    rows: Tensor
    """(b,) int64 ascending."""
    positions: Tensor
    """(t,), or (b, t) where every row has its own; int64 ascending."""
    statistic: Tensor | None = None
    """(t, C), or (b * t, C), float32: where the merger uses it."""
    mean: Tensor | None = None
    """(C,) float32: the channels' mean, where compensation uses it."""
    states: Tensor | None = None
    """(b, t, C): what enters the consumer, where compensation checks its shares."""
    real: Tensor | None = None
    """(b, t) bool: the real tokens among them; None where all are."""
    reached: bool = True
    """Whether any token of the probe reaches the site; a routed expert may get none."""


class Prober:
    """Chooses and runs the probe of every batch; its only state is the random generator."""

    def __init__(self, strategy: Strategy, selector: ProbeSelector, stages: Stages):
        self.strategy, self.selector, self.stages = strategy, selector, stages
        merger = strategy.merger
        self._statistic = strategy.scorer.statistic if merger is not None and merger.uses_probe else None
        self._uses_mean = strategy.compensate.uses_probe
        self._is_foreign = is_foreign(selector)
        self.restart()

    def restart(self) -> None:
        """Restart the random generator."""
        self.generator = torch.Generator().manual_seed(self.strategy.seed)

    @torch.no_grad()
    def probe(
        self,
        cut: SiteCut,
        given: SiteInput,
        selected: tuple[Tensor, Tensor] | None = None,
        entered: Tensor | None = None,
    ) -> Probe:
        """Choose the probe's tokens, and run the site's first half on them if the merger or compensation needs it.

        Not where it is known already which tokens are ``selected``, and what has ``entered`` the consumer there
        (b, t, C).
        """
        strategy, valid = self.strategy, given.valid
        rows, positions = self.select(cut, given) if selected is None else selected
        probe = Probe(rows, positions)
        if self._statistic is None and not self._uses_mean:
            return probe
        with self.stages.probe:
            x = entered
            if x is None:
                x = probe_states(cut, given, rows, positions, strategy.mask_positions(positions))
                x = x.reshape(len(rows), positions.shape[-1], -1)
            real = None if valid is None else pick_tokens(valid, rows, positions)
            tokens, counted = x, real
            if positions.dim() == 2:  # token by token, each a position of its own
                tokens, counted = x.reshape(1, -1, x.shape[-1]), None if real is None else real.reshape(1, -1)
            if self._statistic is not None:
                probe.statistic = strategy.measure(self._statistic, tokens, counted, cut.state.history.mean)
            if self._uses_mean:
                probe.mean = mean_of(x, real)
                given.batch.checks.add(probe.mean, PROBED, cut.site)
            if strategy.compensate.checks_shares:
                probe.states, probe.real = x, real
        return probe

    def select(self, cut: SiteCut, given: SiteInput) -> tuple[Tensor, Tensor]:
        """Choose the probe's tokens: rows (b,) and positions (t,) or (b, t)."""
        with self.stages.select:
            states = given.residual if self.selector.looks_at == "residual" else given.normed(cut)
            counted = None if given.valid is None else self.strategy.counted(given.valid)
            looks = self._is_foreign and not torch.compiler.is_compiling()
            before = states._version if looks and not states.is_inference() else None
            generator = given.generator or given.batch.generator or self.generator
            rows, positions = self.selector.select(states, counted, generator)
            checked(rows, (len(rows),), "select (rows)", "probe selector", self.selector, cut.binding.site)
            shape = (len(rows), positions.shape[-1])[2 - positions.dim() :]
            checked(positions, shape, "select (positions)", "probe selector", self.selector, cut.binding.site)
            if looks and positions.device.type == "cpu":  # elsewhere reading the values would wait for the device
                check_picks(rows, positions, states.shape, self.selector, cut.binding.site)
            if before is not None and states._version != before:
                raise PluginError(
                    f"{cut.site.label}: {named(self.selector)} has written to the states that it was given, which the "
                    "model computes with; fix the plugin (write to a copy)"
                )
        return rows, positions

    @torch.no_grad()
    def probe_of(self, cut: SiteCut, x: Tensor, weights: Tensor | None, batch: Batch) -> Probe:
        """The probe of a routed expert, from what enters its consumer for the probe's tokens that reach it, (n, C).

        weights (n,): the router's, where statistics are weighted by them.
        """
        nowhere = torch.zeros(1, dtype=torch.int64, device=x.device)
        probe = Probe(nowhere, nowhere, reached=len(x) > 0)
        with self.stages.probe:
            if probe.reached and self._statistic is not None:
                weighted = x if weights is None else x.float() * weights[:, None]
                probe.statistic = self.strategy.measure(
                    self._statistic, weighted[:, None], None, cut.state.history.mean
                )
            if probe.reached and self._uses_mean:
                probe.mean = x.float().mean(0)
                batch.checks.add(probe.mean, PROBED, cut.site)
                if self.strategy.compensate.checks_shares:
                    probe.states = x[None]
        return probe


def mean_of(x: Tensor, valid: Tensor | None) -> Tensor:
    """The channels' mean over the probe's real tokens; x (b, t, C) -> (C,) float32."""
    total, counts = position_sums(x, valid)
    return total.sum(0) / counts.sum().clamp(min=1)


@torch.no_grad()
def probe_states(cut: SiteCut, given: SiteInput, rows: Tensor, positions: Tensor, mask_positions: Tensor) -> Tensor:
    """What would enter the consumer for the probe's tokens, all units kept; (b, t, C).

    No attention, rotary or activation code is repeated here: the block runs its own forward, and what reaches its
    consumer is kept. Positions are (t,), or (b, t) where every row has its own. ``mask_positions``, of the same shape
    or (t,), are the positions whose attention mask the probe gets.
    """
    binding, valid = cut.binding, None
    if given.hidden is None:
        chosen = binding.normed(pick_tokens(given.residual, rows, positions))
    else:
        chosen = pick_tokens(given.hidden, rows, positions)
    if given.valid is not None:
        valid = pick_tokens(given.valid, rows, positions)
    products = None
    if given.reuse and given.hidden is not None and positions.dim() == 1:
        products = ProbeProducts(given.hidden, rows, positions)
    if cut.open_cut is not None:
        cut.suspend()
    probe = given.batch.probe = ProbeRun(valid, products)
    try:
        if binding.activation is not None:
            return binding.activation(binding.entry.forward(chosen))
        others = given.arguments and chosen_arguments(binding.site, given, rows, positions, mask_positions)
        for name in binding.site.position_tables:
            table = getattr(binding.entry, name)
            vars(binding.entry)[name] = _chosen_mask(table, given.residual.shape[0], rows, mask_positions)
        binding.entry.forward(chosen, **others)
    finally:
        probe.is_running = False
        for name in binding.site.position_tables:
            vars(binding.entry).pop(name, None)
    binding.check_read(probe.read)
    states, probe.states = probe.states, None
    assert states is not None  # the consumer was called
    return states


def chosen_arguments(
    site: Site, given: SiteInput, rows: Tensor, positions: Tensor, mask_positions: Tensor
) -> dict[str, Any]:
    """The block's other arguments, those per token cut to the probe's tokens, the cache left out."""
    batch, length = given.residual.shape[:2]
    heads = {argument.name: site.units * argument.per_unit for argument in site.unit_arguments}

    def part(name: str, value: Any) -> Any:
        if isinstance(value, (tuple, list)):  # cosines and sines
            return type(value)(part(name, each) for each in value)
        if not isinstance(value, Tensor):
            return value
        if name in heads:
            return _chosen_keys(name, value, heads[name], length, rows, positions)
        found = _chosen_tokens(value, batch, length, rows, positions)
        if found is None and length in value.shape[1:] and length > 1:
            raise _unknown_layout(name, value, length)
        return value if found is None else found

    chosen = without_caches(given.arguments)
    mask = chosen.pop(MASK, None)
    masked = {MASK: mask if mask is None else _chosen_mask(mask, batch, rows, mask_positions)}
    return {name: part(name, value) for name, value in chosen.items()} | (masked if MASK in given.arguments else {})


def _chosen_tokens(value: Tensor, batch: int, length: int, rows: Tensor, positions: Tensor) -> Tensor | None:
    """The probe's tokens of a tensor with all of the batch; None for one of another layout.

    Layouts are (B or 1, T, ...), (T, X) for all rows, (B or 1, 1, T, X) with an axis for heads, and (L, B, T, ...).
    """
    shape, dims = value.shape, value.dim()
    if dims < 2:
        return None
    if shape[0] in (1, batch) and shape[1] == length and (dims < 4 or length not in shape[2:]):
        return pick_tokens(value, rows, positions, batch)
    if dims == 2 and shape[0] == length != shape[1] and positions.dim() == 1:
        return value.index_select(0, positions)
    if dims == 2 or shape[2] != length or length in shape[3:]:
        return None
    if dims == 4 and shape[1] == 1 and shape[0] in (1, batch):
        return pick_tokens(value.squeeze(1), rows, positions, batch).unsqueeze(1)
    if shape[1] == batch:
        return torch.stack([pick_tokens(each, rows, positions, batch) for each in value])
    return None


def _chosen_keys(name: str, value: Tensor, heads: int, length: int, rows: Tensor, positions: Tensor) -> Tensor:
    """The probe's keys of a :class:`~prunekit.registry.UnitArgument` with so many heads, (..., keys), the last T of
    which are the batch's."""
    by_row = value if value.dim() == 4 else value.unflatten(0, (-1, heads))
    if value.dim() not in (3, 4) or by_row.shape[2] > 1 or (positions.dim() == 2 and len(by_row) == 1):
        raise _unknown_layout(name, value, length)
    keys = by_row[..., -length:]
    keys = keys.index_select(0, rows) if len(keys) > 1 else keys
    if positions.dim() == 1:
        chosen = keys.index_select(3, positions)
    else:
        chosen = keys.take_along_dim(positions[:, None, None], 3)
    return chosen if value.dim() == 4 else chosen.flatten(0, 1)


def _unknown_layout(name: str, value: Tensor, length: int) -> ModelError:
    return ModelError(
        f"the block is called with {name} {tuple(value.shape)}, which depends on the {length} positions of the batch, "
        "and a probe does not know how to take a part of it; use a strategy without a probe (wanda_sp, flap)"
    )


def _chosen_mask(attention_mask: Tensor, batch: int, rows: Tensor, mask_positions: Tensor) -> Tensor:
    """An attention mask (B or 1, 1, T, T) or (B or 1, T) of the probe's tokens alone; mask_positions (t,) or (b, t)."""
    if not isinstance(attention_mask, Tensor):
        raise ModelError(
            f"the attention mask is a {type(attention_mask).__name__}, of which a probe cannot take a part; use "
            "attn_implementation 'sdpa' or 'eager', and a mask that is a tensor"
        )
    if mask_positions.dim() == 2:
        attention_mask = attention_mask.expand(batch, *attention_mask.shape[1:])
    if attention_mask.dim() == 2:
        return pick_tokens(attention_mask, rows, mask_positions)
    if attention_mask.shape[0] == batch > 1:
        attention_mask = attention_mask.index_select(0, rows)
    if mask_positions.dim() == 1:
        return attention_mask.index_select(2, mask_positions).index_select(3, mask_positions)
    each = torch.arange(len(rows), device=rows.device)[:, None, None]
    return attention_mask[each, :, mask_positions[:, :, None], mask_positions[:, None, :]].permute(0, 3, 1, 2)


def pick_tokens(t: Tensor, rows: Tensor, positions: Tensor, batch: int = 1) -> Tensor:
    """The tokens of ``rows`` (b,) at ``positions`` (t,), or (b, t) row by row; (B or 1, T, ...) -> (b, t, ...).

    A tensor with one row that stands for all ``batch`` rows stays one row where all have the same positions.
    """
    if positions.dim() == 2 and t.shape[0] < batch:
        t = t.expand(batch, *t.shape[1:])
    t = t.index_select(0, rows) if t.shape[0] > 1 else t
    if positions.dim() == 1:
        return t.index_select(1, positions)
    return t[torch.arange(len(rows), device=rows.device)[:, None], positions]
