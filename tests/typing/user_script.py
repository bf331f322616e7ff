"""What users write, checked by mypy (`make types`): nothing here may need a cast or an ignore."""

from typing import ClassVar, Literal

import torch
from prunekit.compress import prune
from prunekit.registry import (
    Compensator,
    Evaluator,
    HistoryMerger,
    HistoryStorage,
    Measurement,
    Prepared,
    ProbeSelector,
    Scorer,
    Site,
    SiteScores,
    Slope,
    SparsityAllocator,
    Subject,
)
from prunekit.strategies import PP, LeastSquares, MovingAverage, PPReference, ProbePruning, Uniform
from torch import Tensor, nn

uniform = Uniform()
storage = HistoryStorage(dtype="float16")
strategy = PP(ratio=0.4, allocator=uniform, history=storage)
PP(ratio=0.4, compensate=LeastSquares(probe=0.5), skip_layers=(0,))
PPReference(ratio=0.4, rescale="off")


class MaxWeight(Scorer):
    """Largest weight times mean square activation."""

    name: Literal["max_weight"] = "max_weight"

    def prepare(self, weight: Tensor, site: Site) -> Tensor:
        return weight.abs().amax(0)

    def score(self, prepared: Tensor, statistic: Tensor) -> Tensor:
        return prepared * statistic


class MaxWeightPP(ProbePruning):
    """Probe Pruning that scores channels by their largest weight."""

    name: Literal["max_weight_pp"] = "max_weight_pp"
    scorer: Scorer = MaxWeight()


class FirstRows(ProbeSelector):
    """The first row of every batch."""

    name: Literal["first_rows"] = "first_rows"

    def select(self, states: Tensor, valid: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, dtype=torch.int64), torch.arange(states.shape[1])


class Larger(MovingAverage):
    """The larger of what the probe and history say."""

    name: Literal["larger"] = "larger"

    def merge(self, probe: Tensor, history: Tensor, site: Site) -> Tensor:
        return torch.maximum(probe, history)


class Everything(SparsityAllocator):
    """Cuts nothing."""

    name: Literal["everything"] = "everything"

    def allocate(self, sites: list[SiteScores], ratio: float) -> list[int]:  # type: ignore[override] # the control
        return [scores.site.units for scores in sites]


class Copied(Compensator):
    """Every dropped channel is predicted by all kept ones alike."""

    needs_covariance: ClassVar[bool] = True
    name: Literal["copied"] = "copied"

    def slope(self, prepared: Prepared, kept: Tensor, dropped: Tensor) -> Slope:
        return (torch.full((len(dropped), len(kept)), 1 / len(kept)),)


class Layers(Evaluator):
    """Number of sites."""

    name: Literal["layers"] = "layers"

    def evaluate(self, subject: Subject) -> Measurement:
        return Measurement({"sites": len(subject.sites)}, {"counted": "sites"})


def three_lines(model: nn.Module, batches: list[dict[str, Tensor]], merger: HistoryMerger) -> None:
    with prune(model, "pp", ratio=0.4, calibration=batches, scorer=MaxWeight(), merger=merger) as pruned:
        print(pruned.counts, pruned.active_parameters())


# The control: mypy reports an ignore that nothing needs, so this line fails where types are not checked at all.
PP(ratio="a lot")  # type: ignore[arg-type]
