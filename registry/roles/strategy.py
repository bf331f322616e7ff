"""The strategy's role: a named composition of components."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator
from torch import Tensor, nn

from ..component import Component, wrong_signature
from ..sites import AttentionUnit, ExpertUnit, Site
from ..tensors.history_storage import HistoryStorage
from ..tensors.statistics import ExpertStatistic, Statistic
from ..text import without_defaults
from .choosing import Chooser
from .compensation import Compensator, NoCompensation
from .fitting import FittedScorer
from .gradients import GradientScorer
from .grouping import Grouping, OneForAll
from .parts import HistoryMerger, MaskApplier, ProbeSelector, Scorer, SparsityAllocator, missing_argument
from .policies import PerPrompt, Policy

PaddingOf = Callable[[Tensor], Tensor | None]


LATER = {
    "experts": "channels",
    "router_weights": False,
    "policy": {"name": "per_prompt"},
    "group_by": {"name": "batch"},
    "long_prompts": "refuse",
    "turns": "refuse",
}
"""Options that are newer than stored results, with their defaults, which are not written: keys of trials stay equal."""


class Strategy(Component):
    """How to score, how much to cut at each site, how to cut, and (with a selector) what to probe in every batch.

    With a ``selector`` and a ``merger`` units are chosen for every batch; without them once, by the calibrated
    statistics. A ``selector`` alone probes every batch for compensation only. Any field can be set in YAML or Python.
    """

    # Whether a ratio is required depends on the allocator.
    ratio: float | None = Field(default=None, description="share of the model's units to cut, 0 <= ratio < 1")
    skip_layers: tuple[int, ...] = Field(default=(), description="layers that are not pruned")
    attention_unit: AttentionUnit = Field(
        default="kv_group",
        description="kv_group cuts a key/value head with its query heads (all four projections and the KV cache); "
        "query_head cuts query heads only, which saves less under grouped-query attention",
    )
    experts: ExpertUnit = Field(
        default="channels",
        description="routed experts: channels cuts channels inside every expert, as in any MLP; whole removes whole "
        "experts with their rows of the router, and nothing else of the model; keep leaves them as they are",
    )
    router_weights: bool = Field(
        default=False,
        description="experts: channels: weight the activations of a token by the router's weight of its expert before "
        "statistics are computed",
    )
    scorer: Scorer
    allocator: SparsityAllocator
    applier: MaskApplier
    selector: ProbeSelector | None = Field(default=None, description="which part of a batch to probe")
    merger: HistoryMerger | None = Field(default=None, description="how the probe and history are merged")
    compensate: Compensator = Field(
        default=NoCompensation(),
        description="how the contribution of the dropped channels is compensated; null: not at all",
    )
    policy: Policy = Field(
        default=PerPrompt(),
        description="generation: which calls are pruned, and when units are chosen again (strategies that decide per "
        "batch)",
    )
    group_by: Grouping = Field(
        default=OneForAll(),
        description="which rows of a batch share a decision: batch, all; row, none; cluster, those with like scores "
        "(strategies that decide per batch)",
    )
    long_prompts: Literal["refuse", "extend"] = Field(
        default="refuse",
        description="batches with more positions than the calibration text had: refuse them, or take for further "
        "positions the mean of the history's last rows",
    )
    turns: Literal["refuse", "keep", "decide"] = Field(
        default="refuse",
        description="several tokens in a cache that is filled (a second turn, the next piece of a prompt): refuse "
        "them, keep the units and run them like decode steps, or decide again and run them like a prompt",
    )
    history: HistoryStorage = Field(
        default=HistoryStorage(), description="how the channels' history is stored, where decisions are made per batch"
    )
    sequential: bool = Field(
        default=False,
        description="calibrate every layer on the outputs of the layers already cut (static strategies; slower)",
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of parts that draw at random without an own seed")

    @field_validator("ratio")
    @classmethod
    def _ratio_in_range(cls, ratio: float | None) -> float | None:
        if ratio is not None and not 0 <= ratio < 1:
            raise ValueError(f"the ratio is the share that is cut, 0 <= ratio < 1; found {ratio}")
        return ratio

    @field_validator("compensate", mode="before")
    @classmethod
    def _null_is_none(cls, compensate: Any) -> Any:
        return NoCompensation() if compensate is None else compensate

    @model_validator(mode="after")
    def _parts_fit(self) -> Strategy:
        for part in (value for _, value in self if isinstance(value, Component)):
            if wrong := wrong_signature(type(part)) or missing_argument(part):
                raise ValueError(wrong)
        if self.merger is not None and self.selector is None:
            raise ValueError("deciding per batch needs both a selector and a merger (or neither, to decide once)")
        if self.selector is not None and self.merger is None and not self.compensate.uses_probe:
            raise ValueError(
                "a selector needs a merger, to decide per batch, or a compensator that reads the probe, such as "
                "probe_mean; set both to null to decide once"
            )
        if self.compensate.uses_probe and self.probes_with is None:
            raise ValueError(
                f"compensator {self.compensate.name} reads a probe of every batch, and this strategy has none; add "
                "a selector (selector: spread), or use compensate: mean"
            )
        if self.dynamic and self.chooser is not None:
            raise ValueError(
                f"scorer {self.scorer.name} chooses units once, by the covariance of their channels, so nothing can be "
                "chosen per batch; set selector and merger to null, or use a scorer such as ppsp"
            )
        if self.compensate.fits_dense_outputs and not self.sequential:
            raise ValueError(
                f"compensator {self.compensate.name} fits the outputs of the dense model, which differ from those of "
                "the dense weights only where layers are pruned one after the other: set sequential to true"
            )
        if self.dynamic and self.scores_gradients:
            raise ValueError(
                f"scorer {self.scorer.name} reads gradients of the loss, which a probe does not have; set selector and "
                "merger to null to decide once, or choose another scorer"
            )
        if self.dynamic and self.scorer.statistic is None:
            raise ValueError(
                f"scorer {self.scorer.name} uses no activations, so it cannot use a probe; "
                "set selector and merger to null to decide once, or choose another scorer"
            )
        if not self.policy.is_plain and not self.dynamic:
            raise ValueError(
                f"policy {self.policy.name} is for strategies that choose units for every prompt, and this one chooses "
                "them once; use policy: per_prompt"
            )
        if not self.policy.is_plain and self.decides_ahead:
            raise ValueError(
                f"policy {self.policy.name} excludes ahead: true of the selector, which chooses units before their "
                "block is called; set ahead to false, or use policy: per_prompt"
            )
        if self.turns == "decide" and not self.dynamic:
            raise ValueError(
                "turns: decide is for strategies that choose units for every prompt, and this one chooses them once; "
                "use turns: keep"
            )
        if self.turns == "keep" and self.policy.reads:
            raise ValueError(
                f"turns: keep: policy {self.policy.name} chooses from single tokens of steps, which a turn does not "
                "have; use turns: decide, or policy: per_prompt"
            )
        if self.dynamic and self.sequential:
            raise ValueError(
                "sequential calibration is for strategies that decide once (no merger): set selector and merger to "
                "null, or sequential to false"
            )
        if self.allocator.measures and not (self.allocator.needs_scores or self.allocator.whole_blocks):
            raise ValueError(
                f"allocator {self.allocator.name} measures cuts by scores, so its needs_scores must be true, too (or "
                "whole_blocks, where every site keeps all or nothing); fix the plugin"
            )
        if self.group_by.splits:
            self._check_grouping()
        if self.decides_in_steps:
            self._check_steps()
        self._check_experts()
        return self

    def _check_grouping(self) -> None:
        """Raise :class:`ValueError` for what excludes several decisions in one batch."""
        name, policy, compensator = f"group_by: {self.group_by.name}", self.policy.name, self.compensate.name
        if not self.dynamic:
            raise ValueError(f"{name} is for strategies that choose units for every batch; leave it out")
        others = {
            f"policy {policy}, whose steps choose again for all rows; use policy: decode_only": self.policy.reads > 0,
            "ahead: true of the selector, which chooses for the whole batch; set ahead to false": self.decides_ahead,
            f"compensator {compensator}, which reads a probe of the whole batch; use compensate: mean": (
                self.compensate.uses_probe
            ),
            f"turns: {self.turns}, which is for caches with one decision; use turns: refuse": self.turns != "refuse",
        }
        for other, found in others.items():
            if found:
                raise ValueError(f"{name} excludes {other}, or group_by: batch")

    def _check_experts(self) -> None:
        """Raise :class:`ValueError` for what cannot be done with routed experts."""
        statistic, whole = self.scorer.statistic, self.experts == "whole"
        by_expert = isinstance(statistic, ExpertStatistic)
        if by_expert and not whole:
            raise ValueError(f"scorer {self.scorer.name} scores whole experts: set experts to whole")
        others = {
            f"scorer {self.scorer.name}, which scores channels; use one of whole experts, such as reap": (
                (statistic is not None and not by_expert) or self.scores_gradients or self.chooser is not None
            ),
            "a selector: experts are removed once; set selector and merger to null": self.probes_with is not None,
            f"compensator {self.compensate.name}, which works on channels; set compensate to null": self.compensates,
            f"applier {self.applier.name}, which leaves the router's rows; use slice": not self.applier.resizes,
            f"allocator {self.allocator.name}, which works by zeroes or on whole blocks; use uniform": (
                self.allocator.measures or self.allocator.whole_blocks
            ),
            "sequential: true": self.sequential,
            "router_weights: true": self.router_weights,
        }
        for other, found in others.items():
            if whole and found:
                raise ValueError(f"experts: whole excludes {other}")
        if self.router_weights and (self.compensates or getattr(statistic, "tracks_mean", False)):
            raise ValueError(
                "router_weights: true weights every statistic, and a mean that is compensated must be that of the "
                "plain activations; set compensate to null and choose a scorer without a mean, or set router_weights "
                "to false"
            )

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: Any) -> dict[str, Any]:
        return without_defaults(handler(self), LATER)

    def _check_steps(self) -> None:
        """Raise :class:`ValueError` for what excludes choosing units in several steps."""
        others = {
            "a selector and a merger, which decide per batch; set both to null": self.dynamic,
            "sequential: true, which decides layer by layer; set it to false": self.sequential,
            f"scorer {self.scorer.name}, which orders all units of a site at once; choose another one": (
                self.chooser is not None
            ),
            f"allocator {self.allocator.name}, which looks at the whole model at once; choose another one": (
                self.allocator.measures or self.allocator.whole_blocks
            ),
            f"allocator {self.allocator.name}, which takes no ratio; choose another one": (
                not self.allocator.takes_ratio
            ),
        }
        for other, found in others.items():
            if found:
                raise ValueError(f"{self.name} chooses units in several steps, which excludes {other}")

    # Hooks that a strategy may override.

    def site_ratio(self, ratio: float, layers: int, skipped: int) -> float:
        """The share that layers that are not skipped lose, so that all layers together lose ``ratio``."""
        return ratio * layers / (layers - skipped)

    def schedule(self, ratio: float) -> Sequence[float]:
        """The ratios at which units are chosen, one after the other; the last is ``ratio``.

        Each choice is made by statistics of the model in which the units that the choice before dropped are zero.
        """
        return (ratio,)

    def mask_positions(self, positions: Tensor) -> Tensor:
        """Positions whose attention mask the probe at ``positions`` (t,) or (b, t) gets; int64 of the same length."""
        return positions

    def counted(self, valid: Tensor | None) -> Tensor | None:
        """Tokens that a selector may choose and that history learns from; (B, T) bool, None for all."""
        return valid

    def measure(self, statistic: Statistic, x: Tensor, valid: Tensor | None, mean: Tensor | None) -> Tensor:
        """The statistic of a probe or a batch at each position; x (B, T, c), valid (B, T) -> (T, c) float32."""
        return statistic.measure(x, valid, mean)

    def install(
        self, model: nn.Module, layers: Sequence[nn.Module], sites: Sequence[Site], padding_of: PaddingOf
    ) -> list[Any]:
        """Forward hooks of the strategy's own, where it probes; their handles are removed with the pruning.

        ``sites`` are all of the model. ``padding_of(states)`` gives the padded tokens (b, t) bool of the probe or batch
        that is running, or None.
        """
        return []

    # What follows from the options.

    @property
    def probes_with(self) -> ProbeSelector | None:
        """The selector of every batch's probe: the strategy's, or that of its compensation; None: no probe."""
        if self.selector is None and self.compensate.uses_probe:
            return getattr(self.compensate, "selector", None)
        return self.selector

    @property
    def chooser(self) -> Chooser | None:
        """The scorer, if it chooses units jointly."""
        return self.scorer if isinstance(self.scorer, Chooser) else None

    @property
    def needs_covariance(self) -> bool:
        """Whether calibration computes the covariance of the channels."""
        return self.compensate.needs_covariance or self.chooser is not None

    @property
    def compensates(self) -> bool:
        """Whether anything is compensated."""
        return not isinstance(self.compensate, NoCompensation)

    @property
    def decides_ahead(self) -> bool:
        """Whether every block is probed while the block before it runs."""
        return self.probes_with is not None and self.probes_with.ahead

    @property
    def dynamic(self) -> bool:
        """Whether units are chosen for every batch."""
        return self.merger is not None

    @property
    def refuses_long_batches(self) -> bool:
        """Whether batches with more positions than the calibration text are refused."""
        return self.merger is not None and self.merger.uses_history and self.long_prompts == "refuse"

    @property
    def calibrates_channels(self) -> bool:
        """Whether calibration gathers statistics of the sites' channels."""
        return self.compensates or (self.scorer.statistic is not None and not self.allocator.whole_blocks)

    @property
    def scores_gradients(self) -> bool:
        """Whether units are scored by gradients of the loss."""
        return isinstance(self.scorer, GradientScorer)

    @property
    def fits(self) -> bool:
        """Whether the scorer fits something with the model before units are chosen."""
        return isinstance(self.scorer, FittedScorer)

    @property
    def decides_in_steps(self) -> bool:
        """Whether units are chosen several times, by the model as cut so far."""
        return len(self.schedule(0.5)) > 1

    @property
    def needs_calibration(self) -> bool:
        """Whether the strategy needs calibration batches."""
        return self.compensates or self.decides_by_activations

    @property
    def decides_by_activations(self) -> bool:
        """Whether the choice of units depends on calibration batches."""
        weights = self.allocator.weight_statistic
        if self.allocator.measures or self.allocator.block_statistic is not None or (weights and weights.uses_inputs):
            return True
        if self.allocator.whole_blocks:
            return False
        if self.chooser is not None or self.scores_gradients or self.fits:
            return True
        if self.allocator.needs_scores and self.scorer.statistic is not None:
            return True
        if self.merger is not None:
            return self.merger.uses_history
        return self.scorer.statistic is not None
