"""The roles: base classes of every plugin, built in or not.

Letters: B rows of a batch, T positions, D hidden size, C channels entering the consumer, U units,
O consumer outputs; b, t: the probe's rows and positions; k: kept units.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..component import Component
from ..sites import AttentionUnit, ExpertUnit, Site, SiteGroup
from ..tensors.blocks import BlockStatistic
from ..tensors.statistics import MeanSquare, Statistic
from ..tensors.weights import WeightStatistic

if TYPE_CHECKING:
    from torch import nn


class Scorer(Component):
    """Computes scores from a statistic of the channels and the consumer's weight; the lowest are cut.

    Every score is *statistic x a constant of the weights*: the O(O x C) part is computed once per site, and a decision
    costs O(C).
    """

    statistic: ClassVar[Statistic | None] = MeanSquare()
    """The statistic of the activations; None for a score of the weights alone."""
    uses_producers: ClassVar[bool] = False
    """Whether it scores by the producers' weights, too. It is then called ``prepare(weight, site, producers)``, with
    the weight (R, D) float32 of every layer of ``site.producers``; declare ``producers: Sequence[Tensor] = ()``."""

    def prepare(self, weight: Tensor, site: Site) -> Any:
        """The weights' part of the score, once per site; weight (O, C) float32 -> anything. None by default."""
        return None

    @abstractmethod
    def score(self, prepared: Any, statistic: Any) -> Tensor:
        """Channel scores; statistic (C,), summed over positions, None if the scorer has none -> (C,); both float32."""

    def unit_scores(self, scores: Tensor, unit_size: int) -> Tensor:
        """Scores of whole units from those of their channels: the sum; (C,) -> (U,)."""
        return scores if unit_size == 1 else scores.view(-1, unit_size).sum(1)


class ProbeSelector(Component):
    """Chooses the rows and positions of a batch that are probed."""

    looks_at: ClassVar[Literal["residual", "hidden"]] = "residual"
    """The residual stream before the block's norm, or the normed hidden states."""

    ahead: bool = Field(
        default=False,
        description="decide for every block while the block before it runs, from the residual stream that it reads "
        "(PP's parallel probing); a CUDA device runs both at once",
    )

    @abstractmethod
    def select(self, states: Tensor, valid: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows (b,) and positions (t,) of the probe, int64, ascending; states (B, T, D), valid (B, T) or None.

        With positions (b, t) every row has its own, and the probe's statistic has one row for each token.

        ``generator`` is a CPU generator seeded by the strategy, for selectors that draw at random.
        """


class HistoryMerger(Component):
    """Merges the probe's statistic with history, and updates history with the statistic of the whole batch."""

    uses_probe: ClassVar[bool] = True
    uses_history: ClassVar[bool] = True

    @abstractmethod
    def merge(self, probe: Any, history: Any, site: Site) -> Tensor:
        """The statistic to score by; probe (t, C), history at the same positions (t, C) -> (t, C).

        A merger with ``uses_probe`` or ``uses_history`` false gets ``None`` for what it does not use.
        """

    def update(self, history: Tensor, observed: Tensor) -> Tensor | None:
        """History after the batch, on its kept channels; (T, c), (T, c) -> (T, c), or None for no change."""
        return None

    @property
    def updates(self) -> bool:
        """Whether ``update`` changes anything; if not, the statistic of the batch is not computed."""
        return False


@dataclass(frozen=True, eq=False)
class Selection:
    """Some rows or columns of a weight, not copied yet.

    The engine copies them in the way that is fastest on the device, or reads them inside the matrix product.
    """

    source: Tensor
    index: Tensor
    """int64, ascending."""
    dim: int = 0
    """0 for rows or the entries of a bias, 1 for columns."""

    def copied(self) -> Tensor:
        """The selected rows or columns as a tensor of their own."""
        return self.source.index_select(self.dim, self.index)


class MaskApplier(Component):
    """Cuts weights to the kept units, for the producers and the consumer.

    Both methods are called for every cut. They return tensors, or a :class:`Selection` of plain rows or columns, which
    the engine copies, or reads in place.
    """

    resizes: ClassVar[bool] = True
    """Whether the cut tensors are smaller; the engine then changes the sizes stored in the model's modules."""

    @abstractmethod
    def producer(
        self, weight: Tensor, bias: Tensor | None, rows: Tensor
    ) -> tuple[Tensor | Selection, Tensor | Selection | None]:
        """Weight (R, D) and bias (R,) of a producer, cut to its kept rows (r,) int64 ascending."""

    @abstractmethod
    def consumer(self, weight: Tensor, columns: Tensor) -> Tensor | Selection:
        """Weight (O, C) of the consumer, cut to its kept columns (c,) int64 ascending."""


@dataclass(frozen=True)
class SiteScores:
    """What an allocator gets: a site and its calibrated scores."""

    site: Site
    channels: Tensor = field(default_factory=lambda: torch.empty(0))
    """(C,) float32; empty where the allocator asks for no scores, or none are known."""
    units: Tensor = field(default_factory=lambda: torch.empty(0))
    """(U,) float32; empty where ``channels`` is."""
    block_statistic: float = math.nan
    """Mean over the calibration tokens of what the allocator's ``block_statistic`` gives for the site's block; NaN
    where it has none."""
    layer_statistic: float = math.nan
    """The same for the whole decoder layer: equal at both of its sites."""
    weight_statistic: float = math.nan
    """What the allocator's ``weight_statistic`` gives for the decoder layer: equal at both of its sites; NaN where it
    has none."""


MEASURED_LENGTH = 256
"""Most tokens of a row of the calibration text that a candidate is measured on, unless an allocator asks for more."""

Objective = Literal["loss", "kl"]
"""What is measured of a cut model: the loss of the next token, or the divergence from the dense model's prediction."""


class Evaluate(Protocol):
    """What an allocator that measures gets: the loss of the model with some of its units cut."""

    def __call__(
        self,
        candidates: Sequence[Sequence[int]],
        tokens: int,
        *,
        length: int = MEASURED_LENGTH,
        objective: Objective = "loss",
        top_logits: int = 0,
    ) -> list[float]:
        """The loss of every candidate, in nats per predicted token, on about ``tokens`` of the calibration text.

        Of a row of the text at most the first ``length`` tokens are measured.

        A candidate is a kept count for every site, in the order of the allocator's ``sites``. Every site keeps the
        units with the highest calibrated scores; nothing is compensated. With the objective ``kl`` it is the divergence
        KL(dense || cut) instead, over the ``top_logits`` tokens that are likeliest by the dense model (0: all). The
        loss is infinite where the cut model gives no finite one. A loss is measured once, also if it is asked for
        again by another pruning of a study.
        """
        ...

    def record(self, **entry: Any) -> None:
        """Have ``entry``, plain data of a search, in the results: once for every step."""
        ...

    def progress(self, items: Iterable, label: str, total: int) -> Iterable:
        """``items``, whose progress is shown; for allocators that ask for one candidate after another."""
        ...


class SparsityAllocator(Component):
    """Decides how many units every site keeps."""

    needs_scores: ClassVar[bool] = False
    """Whether it cannot work without the calibrated scores of all sites."""
    uses_scores: ClassVar[bool] = False
    """Whether it gets the scores where they are known before the cut, and none (length 0) where they are not."""
    takes_ratio: ClassVar[bool] = True
    whole_blocks: ClassVar[bool] = False
    """Whether every site keeps all of its units or none. Then no site needs scores, and none is calibrated for them."""
    spares: ClassVar[tuple[SiteGroup, ...]] = ()
    """Groups of sites that it leaves whole on purpose."""
    nested: ClassVar[bool] = False
    """Whether a larger ratio contains the cut of a smaller one: no site then keeps more."""
    measures: ClassVar[bool] = False
    """Whether it measures the model. Then ``needs_scores`` or ``whole_blocks`` is true, too, and it is called
    ``allocate(sites, ratio, evaluate)`` with an :class:`Evaluate`; declare ``evaluate: Evaluate | None = None``."""

    @property
    def block_statistic(self) -> BlockStatistic | None:
        """What is measured of every block of the dense model on the calibration text, for :class:`SiteScores`; None:
        nothing."""
        return None

    @property
    def weight_statistic(self) -> WeightStatistic | None:
        """What is measured of the weights of every decoder layer of the dense model, for :class:`SiteScores`; None:
        nothing."""
        return None

    @property
    def looks_at_model(self) -> bool:
        """Whether counts depend on more than ratio and sites: on scores, blocks, weights or losses."""
        looks = self.block_statistic is not None or self.weight_statistic is not None
        return self.needs_scores or self.measures or looks

    def granularity(self, site: Site) -> int:
        """The number whose multiples a site keeps: a cut misses the ratio by up to so many units of each site."""
        return site.units if self.whole_blocks else 1

    @abstractmethod
    def allocate(self, sites: Sequence[SiteScores], ratio: float) -> list[int]:
        """The number of units that each site keeps, in the order of ``sites``.

        Skipped layers are not in ``sites``. ``ratio`` is the share of these sites to cut, already raised for the
        skipped layers (:meth:`Strategy.site_ratio`); 0 where ``takes_ratio`` is false.
        """


def missing_argument(part: Component) -> str | None:
    """One sentence on a method that does not take what the part asks for; None where all is well."""
    method: Callable[..., Any]
    if isinstance(part, Scorer) and part.uses_producers:
        method, argument = part.prepare, "producers"
    elif isinstance(part, SparsityAllocator) and part.measures:
        method, argument = part.allocate, "evaluate"
    else:
        return None
    found = inspect.signature(method).parameters
    if len(found) > 2:
        return None
    return (
        f"{type(part).__name__}.{method.__name__} takes ({', '.join(('self', *found))}), but it is called with one "
        f"more argument, {argument}; fix the plugin"
    )


class SizeFields(BaseModel):
    """Fields of a family's configuration that hold the sizes of a decoder layer; exports write smaller ones there."""

    model_config = ConfigDict(frozen=True)

    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    """None, or a field that is not there: the family has as many key/value heads as query heads."""
    width: str = "intermediate_size"
    """MLP channels."""
    head_size: str | None = "head_dim"
    """None: the family divides the hidden size by the number of heads, so that heads cannot go."""


class Architecture(Component):
    """Lists the prunable sites of a model family."""

    model_types: tuple[str, ...]
    """``config.model_type`` values it serves."""
    layers: str
    """Path of the decoder layers' list."""
    form: str = ""
    """What its layers have that Llama's have not, in a few words such as "parallel blocks"."""
    sizes: SizeFields | None = None
    """Where smaller models of the family are written; None: exports of other shapes refuse it."""
    leaves: str = ""
    """What large part of the layers no site cuts, such as "routed experts". A layer may then lack one of its two sites.
    Empty: every layer has both."""

    @abstractmethod
    def sites(self, model: nn.Module, attention_unit: AttentionUnit) -> list[Site]:
        """All sites of ``model``, layer by layer, attention before MLP.

        Raises :class:`~prunekit.registry.ModelError` where this model's shapes cannot be cut.
        """

    def expert_sites(self, model: nn.Module, unit: ExpertUnit) -> list[Site]:
        """The sites of routed experts, layer by layer, with channels or whole experts as units; none: it has none.

        :func:`~prunekit.registry.expert_sites` makes those of one layer.
        Raises :class:`~prunekit.registry.ModelError` where these experts cannot be cut.
        """
        return []
