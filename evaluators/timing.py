"""Clocks, percentiles, and what a protocol says about the machine that ran the clock."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from ..registry.tensors.devices import place_name

Result = TypeVar("Result")

PERCENTILE = 0.95


@dataclass(frozen=True)
class Clock:
    """The wall clock, read when every accelerator that the model lies on has done what it was asked."""

    devices: tuple[torch.device, ...] = ()
    """The accelerators; none for a model on the CPU, which has always finished."""
    name: ClassVar[str] = "wall clock"

    def finish(self) -> None:
        """Wait until the accelerators are idle."""
        for device in self.devices:
            torch.accelerator.synchronize(device)

    def now(self) -> float:
        """Seconds since some fixed moment, all work done."""
        self.finish()
        return time.perf_counter()

    def timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        """Seconds that ``call`` takes from an idle device to a finished result, and the result.

        The result is handed back so that giving its memory free is not in the time.
        """
        start = self.now()
        result = call()
        return self.now() - start, result


class EventClock(Clock):
    """Events on the stream of one CUDA device: what the device took, its waiting for the host included."""

    name: ClassVar[str] = "CUDA events"

    def timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        with torch.cuda.device(self.devices[0]):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.finish()
            begin.record()
            result = call()
            end.record()
            self.finish()
        return begin.elapsed_time(end) / 1000, result  # events tell milliseconds


def clock_of(model: Any) -> Clock:
    """CUDA events for a model that lies on one CUDA device as a whole, else the wall clock."""
    devices = accelerators(model)
    whole = all(parameter.device.type == "cuda" for parameter in model.parameters())
    one = len(devices) == 1 and devices[0].type == "cuda"
    return EventClock(devices) if one and whole else Clock(devices)


def accelerators(model: Any) -> tuple[torch.device, ...]:
    """The devices besides the CPU that the model's weights lie on, or are moved to when they are needed."""
    found = {parameter.device for parameter in model.parameters()}
    # What accelerate has offloaded lies on "meta" between the calls, and runs where its device map says.
    places = (getattr(model, "hf_device_map", None) or {}).values()
    found |= {torch.device(place_name(place)) for place in places if place != "disk"}
    return tuple(sorted((device for device in found if device.type not in ("cpu", "meta")), key=str))


def percentile(samples: Sequence[float]) -> float:
    """The 95th percentile by nearest rank: the smallest sample that 95% of them do not exceed.

    It is always a sample; of fewer than 20 it is the largest.
    """
    return sorted(samples)[math.ceil(PERCENTILE * len(samples)) - 1]


def machine(model: Any) -> dict[str, Any]:
    """What a protocol says about the machine: processor, threads, accelerators, torch's version."""
    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    names = [torch.cuda.get_device_name(device) for device in accelerators(model) if device.type == "cuda"]
    return {**facts, "accelerator": ", ".join(names)} if names else facts


def processor() -> str:
    """The processor's name, as well as this platform tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    return platform.processor() or platform.machine()
