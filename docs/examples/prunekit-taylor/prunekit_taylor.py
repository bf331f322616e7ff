"""LLM-Pruner's first-order importance (Ma et al., 2023, arXiv 2305.11627) as a plugin for prunekit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from prunekit.registry import (
    FittedScorer,
    MaskApplier,
    Scorer,
    Site,
    SparsityAllocator,
    Strategy,
    hookimpl,
    linear_at,
)
from prunekit.strategies import Slice, Uniform
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PAPER = "LLM-Pruner: On the Structural Pruning of Large Language Models, NeurIPS 2023, arXiv 2305.11627"


class TaylorScorer(FittedScorer):
    """How much the loss changes without a unit: the sum of |W G| over all weights of the unit, G the gradient."""

    paper: ClassVar[str] = PAPER
    name: Literal["taylor"] = "taylor"

    def fit(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        paths = {path for site in sites for path in (*(part.path for part in site.producers), site.consumer)}
        weights = {path: linear_at(model, path).weight.requires_grad_(True) for path in paths}
        predicted = sum(int((targets_of(batch) >= 0).sum()) for batch in batches)
        sums = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in weights.items()}
        for batch in batches:
            loss = summed_loss(model, batch) / predicted
            for path, gradient in zip(paths, torch.autograd.grad(loss, [weights[p] for p in paths]), strict=True):
                sums[path] += gradient.float()
        products = {path: (weights[path].detach().float() * sums[path]).abs() for path in paths}
        return [self.of_units(site, products) for site in sites]

    def of_units(self, site: Site, products: Mapping[str, Tensor]) -> Tensor:
        """The sums over the matrices of a site; products (R, I) of each matrix -> (U,)."""
        units = torch.arange(site.units, device=products[site.consumer].device)
        scores = products[site.consumer][:, site.columns(units)].sum(0).view(site.units, -1).sum(1)
        for part in site.producers:
            rows = products[part.path].sum(1)
            for segment in part.segments:
                scores = scores + rows[segment.of(units)].view(site.units, -1).sum(1)
        return scores


def targets_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The next token of every position (B, T - 1), -100 where it or the position is padding."""
    ids = batch["input_ids"]
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return ids[:, 1:].masked_fill(~(real[:, 1:] & real[:, :-1]), -100)


def summed_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of the predicted tokens of a batch, summed, in float32."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    targets = targets_of(batch).to(logits.device).flatten()
    return cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum")


class Taylor(Strategy):
    """LLM-Pruner by first-order importance: the same share of units in every layer."""

    paper: ClassVar[str] = PAPER
    name: Literal["taylor"] = "taylor"
    scorer: Scorer = TaylorScorer()
    allocator: SparsityAllocator = Uniform()
    applier: MaskApplier = Slice()


@hookimpl
def scorers() -> list[type[Scorer]]:
    return [TaylorScorer]


@hookimpl
def strategies() -> list[type[Strategy]]:
    return [Taylor]
