"""The published code of Probe Pruning (Qi-Le1/Probe_Pruning): PP and its Wanda-sp baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...registry import (
    AttentionUnit,
    HistoryMerger,
    MaskApplier,
    PaddingOf,
    ProbeSelector,
    Scorer,
    Site,
    SparsityAllocator,
    Statistic,
    Strategy,
)
from ..allocation import Uniform
from ..application import Slice
from ..pp.mergers import ImportanceScaled, MovingAverage
from ..pp.scorer import PPsp
from ..pp.selectors import ResidualNorm, WholeBatch
from ..wanda_sp import WandaSpScorer

PAD_EPSILON = 1e-3
"""Added to the counts of real tokens in batches that have padding."""


class PPRepository(Strategy):
    """What every run of the repository has in common: its skipped layers, units, rounding and ratio."""

    skip_layers: tuple[int, ...] = Field(default=(0, 1, 2), description="layers that are not pruned")
    attention_unit: AttentionUnit = Field(
        default="query_head", description=Strategy.model_fields["attention_unit"].description
    )
    rescale: Literal["two_decimals", "off"] = Field(
        default="two_decimals",
        description="two_decimals rounds the harder ratio of the layers that are not skipped; off leaves the ratio",
    )
    allocator: SparsityAllocator = Uniform(rounding="down", mlp_multiple=64)
    applier: MaskApplier = Slice()

    def site_ratio(self, ratio: float, layers: int, skipped: int) -> float:
        return ratio if self.rescale == "off" else round(super().site_ratio(ratio, layers, skipped), 2)


class PPReferenceProbing(PPRepository):
    """The probe of the repository: it has the mask of the first positions, and padding is zeroed.

    The mask is wrong under left padding. Padded tokens are ranked like real ones; their embeddings and attention
    outputs are zeroed, and 1e-3 is added to the counts of real tokens.
    """

    scorer: Scorer = PPsp()
    selector: ProbeSelector | None = Field(default=ResidualNorm(), description="which part of a batch to probe")
    merger: HistoryMerger | None = Field(default=ImportanceScaled(), description="how the probe and history are merged")

    def mask_positions(self, positions: Tensor) -> Tensor:
        return torch.arange(positions.shape[-1], device=positions.device)

    def counted(self, valid: Tensor | None) -> Tensor | None:
        return None

    def measure(self, statistic: Statistic, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        if valid is None:
            return statistic.measure(x, None, mean)
        return statistic.measure(x, None, mean) * (x.shape[0] / (valid.sum(0) + PAD_EPSILON))[:, None]

    def install(
        self, model: nn.Module, layers: Sequence[nn.Module], sites: Sequence[Site], padding_of: PaddingOf
    ) -> list[Any]:
        """Zero padded tokens where they enter the first layer and where they enter any out-projection."""

        def zeroed(states: Tensor) -> Tensor:
            padding = padding_of(states)
            return states if padding is None else states.masked_fill(padding[..., None], 0)

        def first_layer(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (zeroed(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": zeroed(kwargs["hidden_states"])}

        def out_projection(linear: nn.Module, args: tuple) -> tuple:
            return (zeroed(args[0]), *args[1:])

        consumers = [model.get_submodule(site.consumer) for site in sites if site.kind == "attention"]
        handles = [consumer.register_forward_pre_hook(out_projection) for consumer in consumers]
        return [layers[0].register_forward_pre_hook(first_layer, with_kwargs=True), *handles]


class PPReference(PPReferenceProbing):
    """PP as its published code computes it."""

    name: Literal["pp_reference"] = "pp_reference"


class PPReferenceFullBatch(PPReferenceProbing):
    """Full-batch probing as PP's published code computes it."""

    name: Literal["pp_reference_full_batch"] = "pp_reference_full_batch"
    selector: ProbeSelector | None = Field(default=WholeBatch(), description="which part of a batch to probe")


class PPReferenceWandaSp(PPRepository):
    """The Wanda-sp baseline of PP's published code."""

    name: Literal["pp_reference_wanda_sp"] = "pp_reference_wanda_sp"
    scorer: Scorer = WandaSpScorer()


class PPReferenceFixedRatio(MovingAverage):
    """A fixed share, of the probe at attention but of history at MLPs, as PP's published code has it."""

    name: Literal["pp_reference_fixed_ratio"] = "pp_reference_fixed_ratio"
    probe: float = Field(default=0.5, ge=0, le=1, description="the probe's share at attention, history's at MLPs")

    def merge(self, probe: Tensor, history: Tensor, site: Site) -> Tensor:
        return torch.lerp(history, probe, self.probe if site.kind == "attention" else 1 - self.probe)
