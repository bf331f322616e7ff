"""Covariances for compensation: gathered for as many sites at once as memory holds, and solved one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import get_max_memory

from ...registry import ChannelMoments, DataError, ModelError
from ...registry.tensors.devices import device_of, weights_present
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from .passes import Batch, Progress, calibrate_sites
from .shared import SomeMoments

SHARE = 0.8
"""Of the free memory that covariances, or sums of gradients, may take where the user sets no limit."""


def gather_covariances(engine: Engine, batches: list[Batch], progress: Progress, known: SomeMoments) -> None:
    """Gather every cut site's covariance on the unpruned model, and compute what its compensation needs of it.

    ``known`` holds moments of consumers that these batches have shown already, and takes copies of what is gathered.
    Raises :class:`ModelError` before anything is gathered where a site does not fit in memory.
    """
    cuts = [cut for cut in engine.cuts if not cut.whole]
    if engine.strategy.compensate.covariance_parts > 1:
        known = SomeMoments(0)
    for cut in cuts:
        if cut.site.consumer in known:
            cut.compensation.take(known[cut.site.consumer].clone())
            finalize(engine, cut)
    groups = grouped([cut for cut in cuts if cut.site.consumer not in known], engine.strategy.dynamic)
    for number, group in enumerate(groups, 1):
        label = "covariances" if len(groups) == 1 else f"covariances, part {number} of {len(groups)}"
        calibrate_sites(engine, batches, progress, group, lambda cut, x, valid: cut.compensation.learn(x, valid), label)
        for cut in group:
            if isinstance(moments := cut.compensation.moments, ChannelMoments):
                known[cut.site.consumer] = moments
            finalize(engine, cut)


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


def finalize(engine: Engine, cut: SiteCut) -> None:
    """Turn a site's moments into what its cuts need."""
    kept = calibrated = None
    if cut.fixed is not None:
        kept = cut.site.columns(cut.fixed)
    elif cut.history.positions:
        calibrated = cut.site.columns(engine.decider.calibrated_units(cut))
    consumer = cut.binding.consumer
    with weights_present(consumer):
        cut.compensation.finalize(kept, calibrated, consumer.weight)
        if kept is not None and consumer.weight.dtype == torch.float16:
            cut.compensation.check_folded(consumer.weight, kept)


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


def grouped(cuts: Sequence[SiteCut], per_batch: bool, rooms: Rooms | None = None) -> list[list[SiteCut]]:
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
        compensator, channels = cut.compensation.compensator, cut.site.channels
        dropped = (cut.site.units - cut.count) * cut.site.unit_size
        working, made, limit = compensator.memory_plan(channels, dropped, per_batch)
        if device not in rooms:
            rooms[device] = _Room(free_memory(device) if limit is None else limit)
        room, covariance = rooms[device], compensator.covariance_parts * ChannelMoments.bytes_of(channels)
        size = max(covariance, made)
        if size + working + room.made + room.staying > room.budget:
            raise ModelError(_too_large(cut, size, working, room, None if limit is not None else device))
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
        if len(grouped(mine, False, rooms)) > 1:
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


def _too_large(cut: SiteCut, covariance: int, working: int, room: _Room, device: torch.device | None) -> str:
    name, held = cut.compensation.compensator.name, room.made + room.staying
    staying = f", in addition to {_size(held)} held for the sites before it" if held else ""
    whose = "may be used" if device is None else f"may be taken on {device}"
    remedy = "Allow more (memory_gib)" if device is None else "Free memory or allow more of it (memory_gib)"
    return (
        f"{cut.site.label}: compensator {name} needs {_size(covariance)} for the covariance of {cut.site.channels:,} "
        f"channels and {_size(working)} to solve it{staying}, and {_size(room.budget)} {whose}; nothing was taken. "
        f"{remedy}, or use compensate: mean"
    )


def _size(size: int) -> str:
    return f"{size / 2**30:.3g} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.3g} MiB"
