"""Clocks, percentiles, and the machine's part of a protocol."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy
import torch

from ..registry import Subject
from ..registry.tensors.devices import place_name

Result = TypeVar("Result")

PERCENTILE = 0.95


@dataclass(frozen=True)
class Clock:
    """The wall clock, read after every accelerator of the model has finished its work."""

    devices: tuple[torch.device, ...] = ()
    """The accelerators; none for a model on the CPU."""
    name: ClassVar[str] = "wall clock"

    def finish(self) -> None:
        """Wait until the accelerators are idle."""
        for device in self.devices:
            torch.accelerator.synchronize(device)

    def now(self) -> float:
        """Seconds since a fixed moment, after all work is finished."""
        self.finish()
        return time.perf_counter()

    def timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds of ``call`` from an idle device to a finished result, and the result.

        The result is returned so that the time does not include freeing it.
        """
        start = self.now()
        result = call()
        return self.now() - start, result


class EventClock(Clock):
    """Events on the stream of one CUDA device: the device's time, with its waiting for the host."""

    name: ClassVar[str] = "CUDA events"

    def timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        with torch.cuda.device(self.devices[0]):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.finish()
            begin.record()
            result = call()
            end.record()
            self.finish()
        return begin.elapsed_time(end) / 1000, result  # milliseconds


def clock_of(model: Any) -> Clock:
    """CUDA events for a model that is entirely on one CUDA device, else the wall clock."""
    devices = accelerators(model)
    whole = all(parameter.device.type == "cuda" for parameter in model.parameters())
    one = len(devices) == 1 and devices[0].type == "cuda"
    return EventClock(devices) if one and whole else Clock(devices)


def accelerators(model: Any) -> tuple[torch.device, ...]:
    """The devices other than the CPU that have the model's weights, or get them when they are needed."""
    found = {parameter.device for parameter in model.parameters()}
    # Weights that accelerate has offloaded are on "meta" between calls, and run on the device of its device map.
    places = (getattr(model, "hf_device_map", None) or {}).values()
    found |= {torch.device(place_name(place)) for place in places if place != "disk"}
    return tuple(sorted((device for device in found if device.type not in ("cpu", "meta")), key=str))


def alternated(
    subject: Subject, name: str, warmup: int, pairs: int, once: Callable[[], Result]
) -> tuple[list[Result], list[Result]]:
    """What ``once`` gives pruned and dense, in turns: ``pairs`` of each, after ``warmup`` rounds that do not count."""
    pruned: list[Result] = []
    dense: list[Result] = []
    for _ in subject.progress(range(warmup + pairs), name, warmup + pairs):
        for into, mode in ((pruned, nullcontext), (dense, subject.dense)):
            with mode():
                into.append(once())
    return pruned[warmup:], dense[warmup:]


def percentile(samples: Sequence[float]) -> float:
    """The 95th percentile by nearest rank: the smallest sample that 95% of them do not exceed.

    It is always a sample; of fewer than 20 it is the largest.
    """
    return numpy.quantile(samples, PERCENTILE, method="inverted_cdf").item()


def machine(model: Any) -> dict[str, Any]:
    """The machine's part of a protocol: processor, threads, accelerators, version of torch."""
    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    names = [torch.cuda.get_device_name(device) for device in accelerators(model) if device.type == "cuda"]
    return {**facts, "accelerator": ", ".join(names)} if names else facts


def processor() -> str:
    """The processor's name, as the platform reports it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    return platform.processor() or platform.machine()
