"""What a forward pass costs: floating point operations and parameters of what stays, pruned beside dense."""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..registry import Evaluator, Measurement, Subject, TextSource, hookimpl
from .inputs import batch_text, clamped, one_batch, setting


class Cost(Evaluator):
    """Operations per token of a prefill, and the parameters of the units that stay, pruned beside dense.

    Both run on the same batch. Counted are matrix products and attention (the whole square: nothing is
    halved for causality), the output layer at every position, and whatever a strategy computes with
    them: a probe's share is in the pruned figure. Element-wise work, scores, sorting and copies of weights
    are not counted. Parameters are no count of memory: a strategy that probes keeps all of them and reads
    all of them to decide.
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
        flops, parameters = counted_flops(subject.model, ids) / ids.numel(), subject.parameters()
        with subject.dense():
            dense_flops, dense_parameters = counted_flops(subject.model, ids) / ids.numel(), subject.parameters()
        values = {
            "flops": flops,
            "dense_flops": dense_flops,
            "flops_ratio": flops / dense_flops,
            "parameters": parameters,
            "dense_parameters": dense_parameters,
            "parameters_ratio": parameters / dense_parameters,
        }
        protocol = {
            "flops": "per token of a prefill; matrix products and full-square attention, output layer at every "
            "position, probe included; element-wise work and copies not counted",
            "parameters": "parameters of the units that stay; a dynamic strategy's probe and its memory still use all",
            "text": batch_text(self.text, self.seed),
            "batch_size": self.batch_size,
            "length": length,
            **setting(subject.model),
        }
        return Measurement(values, protocol)


def counted_flops(model: Any, ids: Tensor) -> int:
    """Floating point operations of one forward pass without a cache; ids (B, T)."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_uncounted()) as counter:
        model(input_ids=ids, use_cache=False)
    return counter.get_total_flops()


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
