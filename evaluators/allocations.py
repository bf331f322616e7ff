"""Peak of the bytes that a call allocates, from CUDA's statistics or, on a CPU, from torch's profiler."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from ..registry import SpecError
from .timing import accelerators

State = TypeVar("State")

MARK = "prunekit measured work"
"""Name of the profiler's event at which the measured work begins."""

PROFILER_WARNINGS = (b"Memory block of unknown size was allocated before the profiling started", b"ActivityProfiler")
"""Parts of lines that the profiler prints whatever its settings are, and that say nothing to a reader."""


def meter(model: Any) -> str:
    """How :func:`peak_bytes` measures, for a protocol; raises :class:`SpecError` if it cannot."""
    kinds = {device.type for device in accelerators(model)}
    unknown = sorted(kinds - {"cuda"})
    if unknown:
        raise SpecError(
            f"memory: allocations are measured on CPUs and CUDA devices, and this model is on {unknown[0]}; "
            "leave the memory evaluator out"
        )
    if kinds:
        return "torch.cuda.max_memory_allocated, summed over devices; memory of the host not included"
    return "cumulative sum of the [memory] events of torch.profiler"


def peak_bytes(model: Any, prepare: Callable[[], State], run: Callable[[State], Any]) -> int:
    """The most bytes allocated at once during ``run(prepare())``, in addition to those before ``prepare``.

    What ``prepare`` allocates and keeps counts; what it frees before ``run`` starts does not.
    """
    meter(model)
    devices = accelerators(model)
    with _without_collections():
        return _peak_on_cuda(devices, prepare, run) if devices else _peak_on_cpu(prepare, run)


def weight_bytes(model: Any) -> int:
    """Bytes of the model's parameters and buffers, shared ones once; those offloaded to disk have none."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta)


@contextmanager
def _without_collections() -> Iterator[None]:
    """A context in which the garbage collector frees nothing: what was left from before would lower the peak."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _peak_on_cuda(devices: tuple[torch.device, ...], prepare: Callable[[], State], run: Callable[[State], Any]) -> int:
    before = [torch.cuda.memory_allocated(device) for device in devices]
    state = prepare()
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    run(state)
    for device in devices:
        torch.cuda.synchronize(device)
    return sum(torch.cuda.max_memory_allocated(d) - b for d, b in zip(devices, before, strict=True))


def _peak_on_cpu(prepare: Callable[[], State], run: Callable[[State], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when the first profile of a process begins
    with without_profiler_warnings(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        state = prepare()
        with record_function(MARK):
            run(state)
        del state
    level = peak = 0
    begun = False
    allocated: dict[int, int] = {}
    # The profiler's table adds up the events within an operator; the events themselves show the peaks.
    for event in sorted(_events(profiler), key=lambda event: event.start_time_ns):
        if event.tag == _EventType.Allocation:
            level += _change(allocated, event.extra_fields.ptr, event.extra_fields.alloc_size)
        elif event.name == MARK:
            begun = True
        if begun:
            peak = max(peak, level)
    return peak


def _events(profiler: Any) -> Iterator[Any]:
    """All events of a profile: operators and allocations, children after their parents."""
    waiting = list(reversed(profiler.profiler.kineto_results.experimental_event_tree()))
    while waiting:
        event = waiting.pop()
        yield event
        waiting.extend(reversed(event.children))


def _change(allocated: dict[int, int], address: int, size: int) -> int:
    """Bytes by which one allocation (size > 0) or release (size < 0) moves the level; keeps ``allocated`` up to date.

    A release counts only if its allocation was seen. For a block that is older than the profile, the profiler reports
    the size of whatever an earlier profile saw at that address.
    """
    if size > 0:
        allocated[address] = size
        return size
    return -allocated.pop(address, 0)


@contextmanager
def without_profiler_warnings() -> Iterator[None]:
    """A context that removes :data:`PROFILER_WARNINGS` from stderr; everything else appears at its end."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            for line in written:
                if not any(words in line for words in PROFILER_WARNINGS):
                    os.write(2, line)
