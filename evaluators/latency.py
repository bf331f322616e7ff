"""How long a prefill takes, measured in pairs with the dense model."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..registry import Evaluator, Measurement, Subject, TextSource, hookimpl
from .inputs import batch_text, clamped, device_of, one_batch, setting

SETTLE = 8
"""Tokens of the short pass before every timed one."""


class Latency(Evaluator):
    """Seconds per batch of a prefill, pruned and dense in turn, and the median of their paired ratios.

    After ``warmup`` untimed passes of each, pruned and dense alternate ``pairs`` times on the same batch
    (a machine that slows down meanwhile slows both). A short untimed pass comes before every timed one, so
    that what the change between pruned and dense costs is not counted: a cut that is made once is gathered
    anew then, one that is made per batch is gathered in the timed pass too. The clock stops when the device
    has finished. Logits are computed at every position and no cache is kept.
    Running a batch moves the history of strategies that probe; the pipeline resets it before each evaluator.
    """

    paired: ClassVar[bool] = True

    name: Literal["latency"] = "latency"
    batch_size: int = Field(20, ge=1, description="sequences of the batch")
    length: int = Field(256, ge=1, description="tokens of each sequence, at most the model's context")
    pairs: int = Field(5, ge=1, description="timed passes of each")
    warmup: int = Field(1, ge=0, description="untimed passes of each before")
    text: TextSource | None = Field(None, description="take the tokens from here; null: random ones")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the random tokens")

    def evaluate(self, subject: Subject) -> Measurement:
        """Time; raises DataError where ``text`` is too short for the batch."""
        length = clamped(self.length, subject.model)
        ids = one_batch(subject, self.text, self.batch_size, length, self.seed)
        pruned, dense = [], []
        rounds = self.warmup + self.pairs
        for _ in subject.progress(iter(range(rounds)), "latency", rounds):
            pruned.append(settled_seconds(subject.model, ids))
            with subject.dense():
                dense.append(settled_seconds(subject.model, ids))
        pruned, dense = pruned[self.warmup :], dense[self.warmup :]
        ratios = [p / d for p, d in zip(pruned, dense, strict=True)]
        values = {
            "seconds": median(pruned),
            "dense_seconds": median(dense),
            "time_ratio": median(ratios),
            "time_ratio_min": min(ratios),
            "time_ratio_max": max(ratios),
        }
        protocol = {
            "seconds": "per batch, prefill with logits at every position, no cache",
            "order": "pruned, dense, pruned, dense, ...",
            "pairs": self.pairs,
            "warmup": self.warmup,
            "text": batch_text(self.text, self.seed),
            "batch_size": self.batch_size,
            "length": length,
            **setting(subject.model),
            **machine(device_of(subject.model)),
        }
        return Measurement(values, protocol)


def settled_seconds(model: Any, ids: Tensor) -> float:
    """:func:`prefill_seconds` after a short pass that lets the model get over a change of mode; ids (B, T)."""
    prefill_seconds(model, ids[:1, :SETTLE])
    return prefill_seconds(model, ids)


def prefill_seconds(model: Any, ids: Tensor) -> float:
    """Wall-clock seconds of one forward pass, from an idle device to a finished result; ids (B, T)."""
    _finish(ids.device)
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    _finish(logits.device)
    return time.perf_counter() - start


def machine(device: torch.device) -> dict[str, Any]:
    """What ran the clock: processor or accelerator, threads, torch's version."""
    facts: dict[str, Any] = {"processor": processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if device.type == "cuda":
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def processor() -> str:
    """The processor's name, as well as this platform tells it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name":
                return name.strip()
    return platform.processor() or platform.machine()


def _finish(device: torch.device) -> None:
    """Wait until an accelerator has done what it was asked; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Latency]
