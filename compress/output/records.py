"""Typed parts that several JSON files share: the model, the calibration and the cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer

from ...registry import SiteKind
from .folders import plain

Value = float | int | str | None

Plain = Annotated[dict[str, Any], BeforeValidator(plain)]
"""A mapping as JSON holds it: NaN and infinity are the texts ``nan``, ``inf`` and ``-inf``."""

Values = Annotated[Mapping[str, Value], BeforeValidator(plain)]
"""Value by name; NaN and infinity are the texts ``nan``, ``inf`` and ``-inf``, as in JSON."""


def as_number(value: Value) -> Value:
    """``value`` with the texts of NaN and infinity as floats."""
    return float(value) if isinstance(value, str) and value in ("nan", "inf", "-inf") else value


class Record(BaseModel):
    """A part of a JSON file; keys of other versions are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    def as_json(self) -> dict[str, Any]:
        """The record as plain data; keys that an older file lacked stay absent."""
        return self.model_dump(exclude_unset=True)


class ModelFacts(Record):
    """Which model was pruned, and how it was run."""

    name: str
    revision: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False
    fingerprint: str | None = None
    """sha256 of the weights."""
    architecture: str | None = None
    parameters: int
    dtype: str
    device: str
    device_map: str | None = None
    """Where the model's parts lie, for a model on several devices."""
    attention: str | None = None
    weights: str | None = None
    """How the weights were stored, where this is not as they were run: ``dequantised from GGUF Q4_1``."""
    tokenizer: str | None = None
    """Where the tokenizer is from, if not from the model."""

    @property
    def form(self) -> str:
        """The dtype, and how the weights were stored where that changed them."""
        return self.dtype + (f", weights {self.weights}" if self.weights else "")


class CalibrationFacts(Record):
    """The text that was calibrated on."""

    text: str
    sequences: int | None = None
    length: int | None = None
    batch_size: int | None = None
    seed: int | None = None
    fingerprint: str | None = None
    """sha256 of the token ids."""
    statistics: str | None = None
    """``read`` or ``written``, where a statistics file is named."""


class Losses(Record):
    """Mean training loss of the first and of the last steps."""

    first: float
    last: float
    averaged_over_steps: int


class Training(Record):
    """The LoRA training of a recovered model, and the text it was trained on."""

    method: str
    peft: str
    rank: int
    alpha: float
    dropout: float
    steps: int
    learning_rate: float
    batch_size: int
    accumulate: int
    seed: int
    layers: list[str]
    schedule: str
    warmup_steps: int
    trainable_parameters: int
    epochs: float
    loss: Losses
    seconds: float
    text: str
    sequences: int
    length: int
    fingerprint: str
    """sha256 of the token ids."""
    weights_before: str | None = None
    """Fingerprint of the weights before the training, where they were written."""

    @property
    def tokens(self) -> int:
        """Tokens that the steps took, repeated ones counted each time."""
        return self.steps * self.batch_size * self.accumulate * self.length

    @property
    def label(self) -> str:
        """The training in a few words: ``LoRA, 200 steps of 2,048 tokens of a.txt at learning rate 0.0001``."""
        return (
            f"LoRA of rank {self.rank}, {self.steps} steps of {self.tokens // self.steps:,} tokens of {self.text}, "
            f"learning rate {self.learning_rate:g}"
        )


What = Literal["parameters", "flops"]
"""What a decoder's cost is counted in."""


Of = Literal["units", "decoder"]
"""What a ratio is a share of."""


class MatchFacts(Record):
    """The ratio that a strategy was given so that its decoder costs what was asked, and what it costs."""

    what: What
    ratio: float
    """The strategy's own."""
    cost: float
    """Share of the dense decoder's."""
    added: float = 0.0
    """The part of ``cost`` that a probe and compensation per batch take."""
    length: int | None = None
    """Positions of the prefill whose operations were counted."""
    batch_size: int | None = None

    @property
    def counted(self) -> str:
        """What the cost is counted in, for sentences."""
        return "parameters" if self.what == "parameters" else "FLOPs"


class Ratio(Record):
    """The share of the units to cut, as asked for and as achieved."""

    asked: float | None = None
    units_cut: float
    """Mean over all sites."""
    prunable_parameters_cut: float
    """Of the parameters of all sites."""
    decoder_parameters_cut: float | None = None
    """Of the parameters of the linear layers of all decoder layers; None in older files."""
    model_parameters_cut: float | None = None
    """Of all parameters of the model, embeddings and towers included; None in older files."""
    left_whole: str | None = None
    """What large part of the layers no site cuts, such as "routed experts"."""
    matched: MatchFacts | None = None
    """Where the decoder's cost was to be matched."""

    @property
    def parameters_cut(self) -> float:
        """The share of the decoder's parameters, in older files of those of all sites."""
        known = self.decoder_parameters_cut
        return self.prunable_parameters_cut if known is None else known


class CompensationFacts(Record):
    """How the contribution of the dropped units was compensated."""

    compensator: Plain
    """Name and options."""
    tokens: int | None = None
    """Tokens of the covariances."""
    ridge: dict[str, float] | None = None
    """``least`` and ``largest`` of all sites, as shares of the mean variance."""
    fell_back: list[str] = Field(default_factory=list)
    """Sites whose covariance could not be solved."""


class Kept(Record):
    """Kept units of a site, and the units there were."""

    kept: int = Field(ge=0)
    units: int = Field(ge=1, le=10**9)

    @property
    def text(self) -> str:
        return f"{self.kept} of {self.units}"


MOST_LAYERS = 10_000

EXPERTS = ("experts", "expert_channels")


def is_expert(kind: SiteKind) -> bool:
    """Whether it is the kind of one routed expert, such as expert3."""
    return kind.startswith("expert") and kind != "experts"


class LayerCut(Record):
    """Kept units of one layer; ``None`` for a site that the layer does not have."""

    layer: int = Field(ge=0)
    attention: Kept | None = None
    mlp: Kept | None = None
    experts: Kept | None = None
    """Whole routed experts, where they are the units."""
    expert_channels: list[Kept] = Field(default_factory=list)
    """Channels of every routed expert, where they are."""

    @classmethod
    def of(cls, layer: int, sites: Mapping[SiteKind, Kept]) -> LayerCut:
        """The record of a layer, from its sites by their kind; those of experts are in order."""
        channels = [kept for kind, kept in sites.items() if is_expert(kind)]
        others = {kind: kept for kind, kept in sites.items() if not is_expert(kind)}
        return cls.model_validate({"layer": layer, **others} | ({"expert_channels": channels} if channels else {}))

    @property
    def sites(self) -> dict[SiteKind, Kept]:
        """Kept units by the kind of the site."""
        kinds: dict[SiteKind, Kept | None] = {"attention": self.attention, "mlp": self.mlp, "experts": self.experts}
        channels = {f"expert{number}": kept for number, kept in enumerate(self.expert_channels)}
        return {kind: kept for kind, kept in kinds.items() if kept is not None} | channels

    @model_serializer(mode="wrap")
    def _without_experts(self, handler: Any) -> dict[str, Any]:
        # Layers without experts are written as they always were.
        return {key: value for key, value in handler(self).items() if key not in EXPERTS or value}


class Cut(Record):
    """How much was cut where."""

    ratio: Ratio
    compensation: CompensationFacts | None
    attention_unit: str
    layers: list[LayerCut] = Field(max_length=MOST_LAYERS)
