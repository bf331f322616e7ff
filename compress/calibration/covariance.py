"""Covariances for choosers and compensation: gathered for as many sites at once as memory holds, solved one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.utils import get_max_memory

from ...registry import ChannelMoments, DataError, MemoryPlan, ModelError, SingularError
from ...registry.tensors.devices import device_of, weights_present
from ...registry.tensors.linears import matrix_of
from ..engine.choosing import choice_of
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from .experts import unit_moments
from .passes import Batch, Progress, calibrate_sites
from .shared import SomeMoments

SHARE = 0.8
"""Of the free memory that covariances, or sums of gradients, may take where the user sets no limit."""


def gather_covariances(engine: Engine, batches: list[Batch], progress: Progress, known: SomeMoments) -> None:
    """Gather every cut site's covariance on the unpruned model, and compute what its compensation needs of it.

    ``known`` holds moments of consumers that these batches have shown already, and takes copies of what is gathered.
    Moments that :func:`order_units` has left are used where the work fits into one group, else gathered anew.
    Raises :class:`ModelError` before anything is gathered where a site does not fit in memory.
    """
    for cut in engine.cuts:
        if cut.whole:
            cut.compensation.forget()
    cuts = [cut for cut in engine.cuts if not cut.whole]
    for cut in cuts:
        if _take(cut, known):
            finalize(engine, cut)
    waiting = [cut for cut in cuts if cut.site.consumer not in known]
    groups = grouped(waiting, engine.strategy.dynamic)
    for cut in waiting if len(groups) > 1 else ():
        cut.compensation.forget()
    for cut in _gathered(engine, batches, progress, groups, known):
        finalize(engine, cut)


def order_units(engine: Engine, batches: list[Batch], progress: Progress, known: SomeMoments) -> None:
    """Have the chooser order the units of every site, by its covariance on the unpruned model.

    ``known`` is that of :func:`gather_covariances`. Moments stay for the compensation where those of all sites fit in
    memory together. Raises what that raises.
    """
    for cut in engine.cuts:
        if _take(cut, known):
            choose(engine, cut)
            cut.compensation.forget()
    groups = grouped([cut for cut in engine.cuts if cut.site.consumer not in known], plan=plan_of_choice)
    stay = engine.strategy.compensate.needs_covariance and not engine.strategy.sequential and len(groups) == 1
    for cut in _gathered(engine, batches, progress, groups, known):
        choose(engine, cut)
        if not stay:
            cut.compensation.forget()


def _take(cut: SiteCut, known: SomeMoments) -> bool:
    """Give a site a copy of its known moments, and say whether there are any."""
    found = known.get(cut.site.consumer)
    if found is not None:
        cut.compensation.take(found.clone())
    return found is not None


def _gathered(
    engine: Engine, batches: list[Batch], progress: Progress, groups: list[list[SiteCut]], known: SomeMoments
) -> Iterator[SiteCut]:
    """The sites of all groups, one after the other, each with its moments; ``known`` takes copies of them."""
    for number, group in enumerate(groups, 1):
        label = "covariances" if len(groups) == 1 else f"covariances, part {number} of {len(groups)}"
        missing = [cut for cut in group if cut.compensation.moments is None]
        if missing:
            calibrate_sites(
                engine, batches, progress, missing, lambda cut, x, valid: cut.compensation.learn(x, valid), label
            )
        for cut in group:
            if isinstance(moments := cut.compensation.moments, ChannelMoments):
                known[cut.site.consumer] = moments
            yield cut


def share_out(engine: Engine, batches: list[Batch]) -> None:
    """Tell every site how many rows the text has; raises :class:`DataError` where its parts would be empty."""
    rows, parts = sum(len(batch["input_ids"]) for batch in batches), engine.strategy.compensate.covariance_parts
    if rows < parts:
        raise DataError(
            f"compensator {engine.strategy.compensate.name}: a calibration text of {rows} rows cannot be divided into "
            f"{parts} parts; give more sequences, or hold fewer parts out (held_out)"
        )
    for cut in engine.cuts:
        cut.compensation.expect(rows)


def choose(engine: Engine, cut: SiteCut) -> None:
    """Have the chooser order a site's units by its moments, which stay."""
    consumer, chooser = cut.binding.consumer, cut.state.chooser
    unreached = cut.site.expert is not None and cut.compensation.moments is None
    if chooser is not None:
        if unreached:
            cut.compensation.take(unit_moments(cut.site.channels, cut.history.device))
        with weights_present(consumer):
            try:
                cut.state.choice = choice_of(chooser, cut.site, cut.compensation.covariance(), matrix_of(consumer))
            except SingularError:
                if cut.site.expert is None:
                    raise
                unit = unit_moments(cut.site.channels, cut.history.device)  # too few tokens have reached it
                cut.compensation.take(unit)
                cut.state.choice = choice_of(chooser, cut.site, cut.compensation.covariance(), matrix_of(consumer))
        if unreached:
            cut.state.unreached, cut.state.choice = True, replace(cut.state.choice, tokens=None)
            cut.compensation.forget()


def finalize(engine: Engine, cut: SiteCut) -> None:
    """Turn a site's moments into what its cuts need."""
    kept = calibrated = None
    if cut.fixed is not None:
        kept = cut.site.columns(cut.fixed)
    elif cut.history.positions:
        calibrated = cut.site.columns(engine.decider.calibrated_units(cut))
    consumer = cut.binding.consumer
    with weights_present(consumer):
        cut.compensation.finalize(kept, calibrated, matrix_of(consumer))
        if kept is not None and consumer.weight.dtype == torch.float16:
            cut.compensation.check_folded(matrix_of(consumer), kept)


@dataclass
class _Room:
    """What is taken of one device's memory."""

    budget: int
    staying: int = 0
    """What was made of the sites of earlier groups."""
    made: int = 0
    """What will have been made of the sites of this group."""
    group: int = 0
    """Covariances of this group, or what is made of them, whichever is more."""
    working: int = 0
    """The most that solving one site of this group takes."""

    def close(self) -> None:
        """The group is solved: its covariances are gone."""
        self.staying += self.made
        self.made = self.group = self.working = 0


Rooms = dict[torch.device, _Room]


class Plan(NamedTuple):
    """What one site takes."""

    moments: int
    """Bytes of its sums while they are gathered."""
    needs: MemoryPlan
    part: str
    """The part of the strategy that takes it, in words."""
    remedy: str


def plan_of_compensation(cut: SiteCut, per_batch: bool) -> Plan:
    """What a site's compensation takes."""
    compensator, channels = cut.compensation.compensator, cut.site.channels
    dropped = (cut.site.units - cut.count) * cut.site.unit_size
    needs = compensator.memory_plan(channels, dropped, per_batch)
    if compensator.fits_dense_stream:  # the plan knows nothing of the outputs
        of_lag = 4 * cut.site.outputs * (channels - dropped)
        needs = needs._replace(working=needs.working + 3 * of_lag, held=needs.held + of_lag)
    return Plan(_bytes_of_sums(cut), needs, f"compensator {compensator.name}", "compensate: mean")


def plan_of_choice(cut: SiteCut, per_batch: bool = False) -> Plan:
    """What ordering a site's units takes; the chooser gets a covariance of its own, and the weight in float32."""
    chooser, compensator, size = cut.state.chooser, cut.compensation.compensator, cut.site.channels
    assert chooser is not None  # only a strategy with a chooser asks
    sums = _bytes_of_sums(cut) if compensator.needs_covariance else ChannelMoments.bytes_of(size)
    plan, copies = chooser.memory_plan(cut.site), ChannelMoments.bytes_of(size) + 4 * _dense_rows(cut) * size
    if cut.binding.consumer.weight.dtype != torch.float32:
        copies += 4 * size * cut.site.outputs
    return Plan(sums, plan._replace(working=plan.working + copies), f"scorer {chooser.name}", "another scorer")


def _bytes_of_sums(cut: SiteCut) -> int:
    """What the sums for a site's compensation take while they are gathered."""
    channels, parts = cut.site.channels, cut.compensation.compensator.covariance_parts
    return parts * ChannelMoments.bytes_of(channels) + 4 * _dense_rows(cut) * channels


def _dense_rows(cut: SiteCut) -> int:
    """Rows of the covariance of the dense model's with a site's channels."""
    compensator = cut.compensation.compensator
    if not compensator.fits_dense_outputs:
        return 0
    return cut.site.channels + (cut.site.outputs if compensator.fits_dense_stream else 0)


def plan_of_both(cut: SiteCut, per_batch: bool = False) -> Plan:
    """What a site takes whose units are chosen and compensated one after the other, from the same moments."""
    plans = [plan_of_choice(cut)] if cut.state.chooser is not None else []
    plans += [plan_of_compensation(cut, per_batch)] if cut.compensation.compensator.needs_covariance else []
    largest, last = max(plans, key=lambda plan: plan.needs.working), plans[-1].needs
    limits = [plan.needs.limit for plan in plans if plan.needs.limit is not None]
    return largest._replace(needs=MemoryPlan(largest.needs.working, last.held, min(limits, default=None)))


def grouped(
    cuts: Sequence[SiteCut],
    per_batch: bool = False,
    rooms: Rooms | None = None,
    plan: Callable[[SiteCut, bool], Plan] = plan_of_compensation,
) -> list[list[SiteCut]]:
    """Sites, in order, in groups whose covariances fit in memory together with what solving one of them takes.

    What is prepared of each site stays where cuts are made ``per_batch``, else its slope; ``rooms`` carries that over
    from earlier calls. Raises :class:`ModelError` where a site does not fit even alone.
    """
    groups: list[list[SiteCut]] = []
    rooms = {} if rooms is None else rooms
    for room in rooms.values():
        room.close()
    for cut in cuts:
        device = device_of(cut.binding.consumer)
        of_site = plan(cut, per_batch)
        working, made, limit = of_site.needs
        if device not in rooms:
            rooms[device] = _Room(free_memory(device) if limit is None else limit)
        room, size = rooms[device], max(of_site.moments, made)
        if size + working + room.made + room.staying > room.budget:
            raise ModelError(_too_large(cut, of_site, size, room, None if limit is not None else device))
        if not groups or room.staying + room.group + size + max(room.working, working) > room.budget:
            groups.append([])
            for other in rooms.values():
                other.close()
        groups[-1].append(cut)
        room.group += size
        room.made += made
        room.working = max(room.working, working)
    return groups


def check_layers(cuts: Sequence[SiteCut]) -> None:
    """Raise :class:`ModelError` where the covariances of one layer's sites do not fit in memory together."""
    rooms: Rooms = {}
    for layer in sorted({cut.site.layer for cut in cuts}):
        mine = [cut for cut in cuts if cut.site.layer == layer and not cut.whole]
        if len(grouped(mine, False, rooms, plan_of_both)) > 1:
            raise ModelError(
                f"layer {layer}: sequential calibration gathers the covariances of both its sites at once, and memory "
                "holds only one of them; free some or allow more (memory_gib), or calibrate in one pass (sequential: "
                "false); nothing was taken"
            )


def free_memory(device: torch.device) -> int:
    """Bytes of a device's free memory that may be taken, where the user sets no limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what earlier passes left over is free too, but counted as taken
    free = get_max_memory()
    key = device.type if device.type in ("cpu", "mps") else device.index or 0
    # A device that is not listed shares the memory of one that is.
    return int(SHARE * free.get(key, max(free.values(), default=0)))


def _too_large(cut: SiteCut, plan: Plan, size: int, room: _Room, device: torch.device | None) -> str:
    held = room.made + room.staying
    staying = f", in addition to {_size(held)} held for the sites before it" if held else ""
    whose = "may be used" if device is None else f"may be taken on {device}"
    remedy = "Allow more (memory_gib)" if device is None else "Free memory or allow more of it (memory_gib)"
    return (
        f"{cut.site.label}: {plan.part} needs {_size(size)} for the covariance of {cut.site.channels:,} "
        f"channels and {_size(plan.needs.working)} to solve it{staying}, and {_size(room.budget)} {whose}; nothing was "
        f"taken. {remedy}, or use {plan.remedy}"
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.3g} MiB"
