"""What a forward pass costs: floating point operations of its parts and parameters of what stays, beside dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..registry import Evaluator, Measurement, Site, Subject, TextSource, hookimpl
from .flop_formulas import formulas
from .inputs import batch_text, clamped, one_batch, setting
from .parts import HEAD, MLP, OTHER, PROJECTIONS, SCORES, Key, charged
from .passes import prefill, settle

PROBE, COMPENSATION = "probe", "compensation"
PARTS = (PROJECTIONS, SCORES, MLP, HEAD, PROBE, COMPENSATION, OTHER)
PART_OF_STAGE = {"probe": PROBE, "compensate": COMPENSATION}


class Cost(Evaluator):
    """Operations per token of a prefill, part by part, and the parameters of the units that stay, beside dense.

    Both run on the same batch. Counted are matrix products, linear systems and attention (the whole square: nothing
    is halved for causality), the output layer at every position, and whatever a strategy computes with
    them. Element-wise work, scores, sorting and copies of weights are not counted. The parts add up to ``flops``:
    the attention's projections, its scores (all of the attention that is no linear layer), the MLP, the output
    layer, the probe, the compensation, and the rest. A short pass comes first, uncounted: what is done once for a
    cut that is made once, such as folding its compensation into the weights, is in no prefill's count.

    ``floor`` is what a model would cost whose weights were sliced to the same counts beforehand, without probe and
    compensation. It is not counted but computed, from the dense model's parts and the sites' shapes; ``over_floor``
    is how many times as much the pruned model costs. What the probe has computed of its tokens need not be computed
    again with the batch: ``reused`` is what that saves, where the runtime makes use of it (on a CPU).

    Parameters are no count of memory: a strategy that probes keeps all of them and reads all of them to decide.
    Running a batch moves the history of strategies that probe; the pipeline resets it before each evaluator.
    """

    paired: ClassVar[bool] = True

    name: Literal["cost"] = "cost"
    batch_size: int = Field(default=20, ge=1, description="sequences of the batch")
    length: int = Field(default=256, ge=1, description="tokens of each sequence, at most the model's context")
    text: TextSource | None = Field(default=None, description="take the tokens from here; null: random ones")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the random tokens")

    def evaluate(self, subject: Subject) -> Measurement:
        """Count; raises DataError where ``text`` is too short for the batch."""
        length = clamped(self.length, subject.model)
        ids = one_batch(subject, self.text, self.batch_size, length, self.seed)
        pruned, kept, parameters = operations(subject, ids), subject.kept(), subject.parameters()
        with subject.dense():
            dense, dense_parameters = operations(subject, ids), subject.parameters()
        tokens, total, dense_total = ids.numel(), sum(pruned.values()), sum(dense.values())
        values = {
            "flops": total / tokens,
            "dense_flops": dense_total / tokens,
            "flops_ratio": total / dense_total,
        }
        if subject.sites:
            floor = sliced_operations(subject.model, subject.sites, kept, dense, tokens)
            values |= {
                "floor": floor / tokens,
                "floor_ratio": floor / dense_total,
                "over_floor": total / floor if floor else None,
            }
            parts, dense_parts = by_part(pruned), by_part(dense)
            for prefix, counted in (("", parts), ("dense_", dense_parts)):
                values |= {f"{prefix}{part}": amount / tokens for part, amount in counted.items()}
            beside = parts[PROBE] + parts[COMPENSATION] + parts[OTHER] - dense_parts[OTHER]
            values["reused"] = max(0, floor - (total - beside)) / tokens
        values |= {
            "parameters": parameters,
            "dense_parameters": dense_parameters,
            "parameters_ratio": parameters / dense_parameters,
        }
        protocol = {
            "flops": "per token of a prefill; matrix products, linear systems and full-square attention, output layer "
            "at every position, probe and compensation included; element-wise work and copies not counted",
            "compensation": "what every batch takes; what is folded into the weights once is not counted",
            "reused": "per token: what the batch is spared because the probe has computed it of its own tokens",
            "floor": "per token, computed: the dense parts without the cut units' weights and scores, no probe and no "
            "compensation",
            "parameters": "parameters of the units that stay; a dynamic strategy's probe and its memory still use all",
            "text": batch_text(self.text, self.seed),
            "batch_size": self.batch_size,
            "length": length,
            "order": "pruned, dense",
            "torch": torch.__version__,
            **setting(subject.model),
        }
        return Measurement(values, protocol)


def operations(subject: Subject, ids: Tensor) -> dict[Key, int]:
    """Floating point operations of one forward pass without a cache, by part and layer; ids (B, T).

    What is counted during a strategy's probe is the probe's, while it compensates the compensation's, in its other
    steps ``other``'s. What changing between pruned and dense costs is left out, by an uncounted pass before; channel
    histories are put back after it, so that what is counted is a first batch.
    """
    settle(subject.model, ids)
    subject.reset()
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=formulas()) as counter,
        charged(subject, counter.get_total_flops, lambda stage: PART_OF_STAGE.get(stage, OTHER)) as spent,
    ):
        prefill(subject.model, ids)
    return dict(spent)


def by_part(counted: Mapping[Key, int]) -> dict[str, int]:
    """Operations of each of :data:`PARTS`, all layers together."""
    return {part: sum(amount for (name, _), amount in counted.items() if name == part) for part in PARTS}


def sliced_operations(
    model: Any,
    sites: Sequence[Site],
    kept: Mapping[tuple[int, str], Sequence[int]],
    dense: Mapping[Key, int],
    tokens: int,
) -> int:
    """Operations of ``model`` physically sliced to as many units as ``kept`` has of each site, and nothing besides.

    ``dense`` are the unsliced model's on ``tokens`` tokens. A unit takes its rows and columns with it, two operations
    for each weight and token, and its share of its layer's attention scores.
    """
    total = sum(dense.values())
    for site in sites:
        units = kept.get((site.layer, site.kind))
        cut = 0 if units is None else site.units - len(units)
        if cut:
            total -= 2 * tokens * cut * _weights_of_unit(model, site)
            if site.kind == "attention":
                total -= dense.get((SCORES, site.layer), 0) * cut // site.units
    return total


def _weights_of_unit(model: Any, site: Site) -> int:
    """Weights of the linear layers that one unit owns, biases left out."""
    rows = (
        (sum(segment.per_unit for segment in producer.segments), model.get_submodule(producer.path).in_features)
        for producer in site.producers
    )
    return sum(count * width for count, width in rows) + site.unit_size * site.outputs


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Cost]
