"""Times, operations and memory of the arms of one setting, measured round by round in one process."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...evaluators.allocations import meter, peak_bytes
from ...evaluators.cost import formulas
from ...evaluators.parts import Attribution
from ...evaluators.timing import Clock, clock_of, machine
from ...registry import STAGES
from ...registry.tensors.kernels import usable_on
from ..calibration.passes import Progress
from .arms import COMPILED, Arm, Setting, batch_of, build, close_all
from .intervals import LEAST_ROUNDS, Ratio, ratio_of

DECIDING = ("select", "probe", "score", "history")
"""Steps that only a strategy with a decision per batch has."""

BREAKDOWN_ROUNDS = 5


class ProcessorClock(Clock):
    """Processor time of this process, which other processes on a shared machine do not change."""

    name: ClassVar[str] = "processor time of the process"

    def now(self) -> float:
        return time.process_time()


@dataclass
class Measured:
    """The measurements of one setting."""

    setting: Setting
    seconds: dict[str, list[float]]
    """Seconds of every arm's passes, round by round."""
    flops: dict[str, int]
    """Operations of a pass of every arm that is not compiled."""
    peak: dict[str, int]
    """Most bytes allocated at once in a pass, without weights and statistics."""
    steps: dict[str, dict[str, float]]
    """Median seconds of each step of every PP arm that is not compiled, and of the whole pass as ``pass``."""
    dense_seconds: float
    """Median seconds of a dense pass, measured in turn with those of ``steps``."""
    protocol: dict[str, Any]

    def ratio(self, arm: str, base: str) -> Ratio | None:
        """The paired ratio of two arms' times; None where one of them was not measured."""
        if arm not in self.seconds or base not in self.seconds:
            return None
        return ratio_of(self.seconds[arm], self.seconds[base])

    def overhead(self, arm: str = "pp") -> float | None:
        """Seconds of the :data:`DECIDING` steps as a share of a dense pass."""
        steps = self.steps.get(arm)
        return None if steps is None else sum(steps[step] for step in DECIDING) / self.dense_seconds


@torch.no_grad()
def measure(
    setting: Setting, names: Sequence[str], rounds: int, warmup: int, cpu_time: bool, progress: Progress
) -> Measured:
    """Build the arms ``names``, dense among them, and measure them.

    Every round runs each arm once on the same new batch; the order of the arms alternates from round to round.
    """
    arms = build(setting, names)
    try:
        clock = ProcessorClock() if cpu_time else clock_of(arms[0].model)
        seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
        total = warmup + rounds
        for number in progress(range(total), setting.words, total):
            ids = batch_of(setting, number)
            for arm in arms if number % 2 == 0 else reversed(arms):
                taken = _timed(clock, arm, ids)
                if number >= warmup:
                    seconds[arm.name].append(taken)
        steps = _steps(clock, arms, setting)
        dense_seconds = steps.pop("dense")["pass"]
        ids = batch_of(setting, 0)
        flops = {arm.name: _operations(arm, ids) for arm in arms if arm.name not in COMPILED}
        peak = {arm.name: _peak(arm, ids) for arm in arms}
        protocol = _protocol(setting, arms, clock, rounds, warmup)
        return Measured(setting, seconds, flops, peak, steps, dense_seconds, protocol)
    finally:
        close_all(arms)


def _timed(clock: Clock, arm: Arm, ids: torch.Tensor) -> float:
    taken, out = clock.timed(lambda: arm.decoder(input_ids=ids, use_cache=False))
    del out
    return taken


def _steps(clock: Clock, arms: Sequence[Arm], setting: Setting) -> dict[str, dict[str, float]]:
    """Median seconds of the steps of every PP arm that is not compiled, and of ``pass``, which dense has too."""
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(BREAKDOWN_ROUNDS):
        ids = batch_of(setting, number)
        for arm in arms:
            if arm.name == "dense":
                seen[arm.name]["pass"].append(_timed(clock, arm, ids))
            elif arm.pruned is not None and arm.name not in COMPILED:
                attribution: Attribution[float] = Attribution(clock.now)
                with arm.pruned.watch(attribution.step):
                    seen[arm.name]["pass"].append(_timed(clock, arm, ids))
                for step in STAGES:
                    seen[arm.name][step].append(attribution.spent[step, None])
    return {name: {step: median(taken) for step, taken in steps.items()} for name, steps in seen.items()}


def _operations(arm: Arm, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        arm.decoder(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


def _peak(arm: Arm, ids: torch.Tensor) -> int:
    held = 0 if arm.pruned is None else arm.pruned.held_bytes()["gathered"]
    return held + peak_bytes(arm.model, lambda: None, lambda _: arm.decoder(input_ids=ids, use_cache=False))


def _same_as_pp(arms: Sequence[Arm]) -> list[str]:
    """Arms that this device cannot run in their own way, so that they run as PP."""
    weight = next(arms[0].model.parameters())
    possible = {"pp-fused": usable_on(weight), "pp-sequential": weight.is_cuda}
    return [arm.name for arm in arms if not possible.get(arm.name, True)]


def _kept(arms: Sequence[Arm]) -> dict[str, str]:
    """Kept units of all cut layers together, by kind, such as ``9 of 15``."""
    pruned = next((arm.pruned for arm in arms if arm.pruned is not None), None)
    if pruned is None:
        return {}
    kept, units = Counter[str](), Counter[str]()
    for site in pruned.sites:
        kept[site.group] += pruned.counts[site.layer, site.kind]
        units[site.group] += site.units
    return {kind: f"{kept[kind]} of {units[kind]}" for kind in sorted(units)}


def _protocol(setting: Setting, arms: Sequence[Arm], clock: Clock, rounds: int, warmup: int) -> dict[str, Any]:
    return {
        **vars(setting),
        "shape": setting.shape.words,
        "skipped_layers": list(setting.skipped_layers),
        "kept": _kept(arms),
        "timed": "decoder without output embeddings, no cache, logits not computed",
        "weights": f"random, seed {setting.seed}",
        "tokens": "random, a new batch in every round, the same for all arms",
        "order": "all arms in every round, the order reversed in every second one",
        "rounds": rounds,
        "warmup": warmup,
        "ratios": "median of the rounds' ratios, with its 95% interval of order statistics; none if the interval "
        f"contains 1, and none for fewer than {LEAST_ROUNDS} rounds",
        "same_as_pp": _same_as_pp(arms),
        "breakdown": f"{BREAKDOWN_ROUNDS} further passes, the device synchronized after every step",
        "clock": clock.name,
        "memory": meter(arms[0].model),
        **machine(arms[0].model),
    }
