"""Covariances for compensation: gathered for as many sites at once as memory holds, and solved one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import get_max_memory

from ..registry import ChannelMoments, Compensator, ModelError
from ..registry.devices import device_of
from .calibration import Batch, Progress, calibrate_sites
from .cut import SiteCut
from .engine import Engine

SHARE = 0.8
"""Of the free memory that covariances may take, where the user sets no limit: batches need the rest."""


def gather_covariances(engine: Engine, batches: list[Batch], progress: Progress) -> None:
    """Gather every cut site's covariance on the unpruned model, and settle what its compensation needs of it.

    Raises :class:`ModelError` before anything is gathered where a site does not fit in memory.
    """
    groups = grouped([cut for cut in engine.cuts if not cut.whole], engine.strategy.dynamic)
    for number, group in enumerate(groups, 1):
        label = "covariances" if len(groups) == 1 else f"covariances, part {number} of {len(groups)}"
        calibrate_sites(engine, batches, progress, group, lambda cut, x, valid: cut.compensation.learn(x, valid), label)
        for cut in group:
            settle(engine, cut)


def settle(engine: Engine, cut: SiteCut) -> None:
    """Turn a site's moments into what its cuts need."""
    kept = usual = None
    if cut.fixed is not None:
        kept = cut.site.columns(cut.fixed)
    elif cut.history.table is not None:
        usual = cut.site.columns(engine.decider.usual(cut))
    cut.compensation.settle(kept, usual)


@dataclass
class _Room:
    """What is taken of one device's memory."""

    budget: int
    staying: int = 0
    group: int = 0


def grouped(cuts: Sequence[SiteCut], per_batch: bool) -> list[list[SiteCut]]:
    """Sites, in order, in groups whose covariances fit in memory together with what solving one of them takes.

    What is prepared of each site stays where cuts are made ``per_batch``, else its slope. Raises
    :class:`ModelError` where a site does not fit by itself.
    """
    groups: list[list[SiteCut]] = []
    rooms: dict[torch.device, _Room] = {}
    for cut in cuts:
        device = device_of(cut.consumer)
        compensator, channels = cut.compensation.compensator, cut.site.channels
        if device not in rooms:
            rooms[device] = _Room(_budget(compensator, device))
        room, covariance = rooms[device], ChannelMoments.bytes_of(channels)
        dropped = (cut.site.units - cut.count) * cut.site.unit_size
        working = compensator.working_bytes(channels, dropped)
        if covariance + working + room.staying > room.budget:
            raise ModelError(_too_large(cut, covariance, working, room, device))
        if not groups or room.group + covariance + working + room.staying > room.budget:
            groups.append([])
            for other in rooms.values():
                other.group = 0
        groups[-1].append(cut)
        room.group += covariance
        # Of a cut made once the slope stays; it has its full size unless the compensator knows of fewer factors.
        room.staying += compensator.held_bytes(channels) if per_batch else 4 * dropped * (channels - dropped)
    return groups


def check_layers(cuts: Sequence[SiteCut]) -> None:
    """Raise :class:`ModelError` where the covariances of one layer's sites do not fit in memory together."""
    for layer in sorted({cut.site.layer for cut in cuts}):
        mine = [cut for cut in cuts if cut.site.layer == layer and not cut.whole]
        if len(grouped(mine, per_batch=False)) > 1:
            raise ModelError(
                f"layer {layer}: sequential calibration gathers the covariances of both its sites at once, and memory "
                "holds only one of them; free some or allow more (memory_gib), or calibrate in one pass (sequential: false)"
            )


def _budget(compensator: Compensator, device: torch.device) -> int:
    if compensator.memory is not None:
        return compensator.memory
    free = get_max_memory()
    return int(SHARE * free.get(device.index or 0 if device.type != "cpu" else "cpu", 0))


def _too_large(cut: SiteCut, covariance: int, working: int, room: _Room, device: torch.device) -> str:
    name = cut.compensation.compensator.name
    staying = f" beside {_gib(room.staying)} held for the sites before it" if room.staying else ""
    whose = "may be used" if cut.compensation.compensator.memory is not None else f"are to be had on {device}"
    return (
        f"{cut.site.label}: compensator {name} needs {_gib(covariance)} for the covariance of {cut.site.channels:,} "
        f"channels and {_gib(working)} to solve it{staying}, and {_gib(room.budget)} {whose}; nothing was taken. Free "
        "memory or allow more of it (memory_gib), or use compensate: mean"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
