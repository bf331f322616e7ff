"""Times, operations and memory of the arms of one setting, taken round by round in one process."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any, ClassVar, TypeVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from ...evaluators.allocations import meter, peak_bytes
from ...evaluators.flop_formulas import formulas
from ...evaluators.timing import Clock, clock_of, machine
from ...registry import STAGES
from ...registry.tensors.kernels import usable_on
from ..calibration.passes import Progress
from .arms import COMPILED, Arm, Setting, batch_of, build, close_all
from .intervals import LEAST_ROUNDS, Ratio, ratio_of

DECIDING = ("select", "probe", "score", "history")
"""Steps that a static cut does not have at all."""

BREAKDOWN_ROUNDS = 5

Result = TypeVar("Result")


class ProcessorClock(Clock):
    """What the processor has spent on this process: on a shared machine others' work does not count."""

    name: ClassVar[str] = "processor time of the process"

    def now(self) -> float:
        return time.process_time()

    def timed(self, call: Callable[[], Result]) -> tuple[float, Result]:
        start = self.now()
        result = call()
        return self.now() - start, result


@dataclass
class Measured:
    """What one setting has shown."""

    setting: Setting
    seconds: dict[str, list[float]]
    """Of every arm, round by round."""
    flops: dict[str, int]
    peak: dict[str, int]
    """Most bytes allocated at once in a pass, beyond weights and statistics."""
    steps: dict[str, dict[str, float]]
    """Of every PP arm that can be watched: the median seconds of a pass's steps, and of the whole pass as ``pass``."""
    dense_seconds: float
    """Of a pass, beside the watched ones."""
    kept: dict[str, str]
    protocol: dict[str, Any] = field(default_factory=dict)

    def ratio(self, arm: str, to: str) -> Ratio | None:
        """Of two arms' paired times; None where one of them was not measured."""
        if arm not in self.seconds or to not in self.seconds:
            return None
        return ratio_of(self.seconds[arm], self.seconds[to])

    def overhead(self, arm: str = "pp") -> float | None:
        """Select, probe, score and history of a pass as a share of a dense one."""
        steps = self.steps.get(arm)
        return None if steps is None else sum(steps[step] for step in DECIDING) / self.dense_seconds


@torch.no_grad()
def measure(
    setting: Setting, names: Sequence[str], rounds: int, warmup: int, cpu_time: bool, progress: Progress
) -> Measured:
    """Build the arms and time them: in every round each once on the same new batch, in turn forwards and backwards."""
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
        steps, dense_seconds = _steps(clock, arms, setting)
        ids = batch_of(setting, 0)
        found = Measured(
            setting,
            seconds,
            flops={arm.name: _operations(arm, ids) for arm in arms if not _compiled(arm)},
            peak={arm.name: _peak(arm, ids) for arm in arms},
            steps=steps,
            dense_seconds=dense_seconds,
            kept=_kept(arms),
        )
        found.protocol = _protocol(found, arms, clock, rounds, warmup)
        return found
    finally:
        close_all(arms)


def _timed(clock: Clock, arm: Arm, ids: torch.Tensor) -> float:
    taken, out = clock.timed(lambda: arm.decoder(input_ids=ids, use_cache=False))
    del out
    return taken


def _steps(clock: Clock, arms: Sequence[Arm], setting: Setting) -> tuple[dict[str, dict[str, float]], float]:
    """Seconds of the steps of watched passes, beside dense passes of the same batches."""
    seen: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    dense: list[float] = []
    for number in range(BREAKDOWN_ROUNDS):
        ids = batch_of(setting, number)
        for arm in arms:
            if arm.name == "dense":
                dense.append(_timed(clock, arm, ids))
            elif arm.pruned is not None and not _compiled(arm):
                with _watched(arm, clock.now) as spent:
                    spent["pass"] = _timed(clock, arm, ids)
                for step in (*STAGES, "pass"):
                    seen[arm.name][step].append(spent[step])
    steps = {name: {step: median(taken) for step, taken in of.items()} for name, of in seen.items()}
    return steps, median(dense) if dense else float("nan")


@contextmanager
def _watched(arm: Arm, now: Callable[[], float]) -> Iterator[Counter]:
    """Within it the seconds of each step of the deciding are added up, all work done at its end."""
    spent: Counter = Counter()

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = now()
        yield
        spent[name] += now() - began

    with arm.pruned.watch(stage):
        yield spent


def _operations(arm: Arm, ids: torch.Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        arm.decoder(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


def _peak(arm: Arm, ids: torch.Tensor) -> int:
    held = 0 if arm.pruned is None else arm.pruned.held_bytes()["gathered"]
    return held + peak_bytes(arm.model, lambda: None, lambda _: arm.decoder(input_ids=ids, use_cache=False))


def _compiled(arm: Arm) -> bool:
    return arm.name in COMPILED


def _same_as_pp(arms: Sequence[Arm]) -> list[str]:
    """Arms whose way cannot be gone here: they do what PP does."""
    weight = next(arms[0].model.parameters())
    possible = {"pp-fused": usable_on(weight), "pp-sequential": weight.is_cuda}
    return [arm.name for arm in arms if not possible.get(arm.name, True)]


def _kept(arms: Sequence[Arm]) -> dict[str, str]:
    """How many units the first cut layer keeps, in words."""
    pruned = next((arm.pruned for arm in arms if arm.pruned is not None), None)
    if pruned is None:
        return {}
    first = {site.kind: site for site in reversed(pruned.sites)}
    return {kind: f"{pruned.counts[site.layer, kind]} of {site.units}" for kind, site in sorted(first.items())}


def _protocol(found: Measured, arms: Sequence[Arm], clock: Clock, rounds: int, warmup: int) -> dict[str, Any]:
    setting = found.setting
    return {
        "preset": setting.preset,
        "shape": setting.shape.words,
        "layers": setting.layers,
        "skipped_layers": list(setting.skipped),
        "dtype": setting.dtype,
        "batch": setting.batch,
        "length": setting.length,
        "ratio": setting.ratio,
        "kept": found.kept,
        "options": dict(setting.options),
        "timed": "decoder without output embeddings, no cache, logits not computed",
        "weights": f"random, seed {setting.seed}",
        "tokens": "random, a new batch in every round, the same for all arms",
        "order": "all arms in every round, in turn forwards and backwards",
        "rounds": rounds,
        "warmup": warmup,
        "ratios": "median of the rounds' ratios, with the 95% interval of order statistics; none where it holds 1, "
        f"and none of fewer than {LEAST_ROUNDS} rounds",
        "same_as_pp": _same_as_pp(arms),
        "breakdown": f"{BREAKDOWN_ROUNDS} further passes, all work done at the end of every step",
        "clock": clock.name,
        "device": setting.device,
        "memory": meter(arms[0].model),
        **machine(arms[0].model),
    }
