"""What a forward pass costs: floating point operations of its parts and parameters of what stays, beside dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..registry import Evaluator, Measurement, Site, Subject, TextSource, hookimpl
from .inputs import batch_text, clamped, one_batch, setting
from .parts import HEAD, MLP, OTHER, PROJECTIONS, SCORES, Key, charged

PROBE = "probe"
PARTS = (PROJECTIONS, SCORES, MLP, HEAD, PROBE, OTHER)


class Cost(Evaluator):
    """Operations per token of a prefill, part by part, and the parameters of the units that stay, beside dense.

    Both run on the same batch. Counted are matrix products and attention (the whole square: nothing is
    halved for causality), the output layer at every position, and whatever a strategy computes with
    them. Element-wise work, scores, sorting and copies of weights are not counted. The parts add up to ``flops``:
    the attention's projections, its scores (all of the attention that is no linear layer), the MLP, the output
    layer, the probe, and the rest.

    ``floor`` is what a model would cost whose weights were sliced to the same counts beforehand, without a probe. It
    is not counted but computed, from the dense model's parts and the sites' shapes; ``over_floor`` is how many times
    as much the pruned model costs.

    Parameters are no count of memory: a strategy that probes keeps all of them and reads all of them to decide.
    Running a batch moves the history of strategies that probe; the pipeline resets it before each evaluator.
    """

    paired: ClassVar[bool] = True

    name: Literal["cost"] = "cost"
    batch_size: int = Field(20, ge=1, description="sequences of the batch")
    length: int = Field(256, ge=1, description="tokens of each sequence, at most the model's context")
    text: TextSource | None = Field(None, description="take the tokens from here; null: random ones")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of the random tokens")

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
            for prefix, counted in (("", pruned), ("dense_", dense)):
                values |= {f"{prefix}{part}": amount / tokens for part, amount in by_part(counted).items()}
        values |= {
            "parameters": parameters,
            "dense_parameters": dense_parameters,
            "parameters_ratio": parameters / dense_parameters,
        }
        protocol = {
            "flops": "per token of a prefill; matrix products and full-square attention, output layer at every "
            "position, probe included; element-wise work and copies not counted",
            "floor": "per token, computed: the dense parts without the cut units' weights and scores, no probe",
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

    What is counted during a strategy's probe is the probe's, in its other steps ``other``'s.
    """
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter,
        charged(subject, counter.get_total_flops, lambda stage: PROBE if stage == "probe" else OTHER) as spent,
    ):
        subject.model(input_ids=ids, use_cache=False)
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
    """Operations of ``model`` physically sliced to as many units as ``kept`` has of each site, without a probe.

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


def _uncounted() -> dict[Any, Any]:
    """Formulas for the attention kernels that torch's own counter passes over, and would count as nothing."""
    names = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    return {getattr(torch.ops.aten, name): _attention_flops for name in names if hasattr(torch.ops.aten, name)}


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Two matrix products for every query head; shapes (B, H, Tq, d), (B, Hkv, Tk, d), (B, Hkv, Tk, dv)."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Cost]
