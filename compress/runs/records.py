"""What results.json holds, as typed records, and the one place that reads them back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from ...registry import SpecError
from ..files.reader import describe
from ..output.formatting import number
from ..output.reading import brief, read_json
from ..output.records import (
    MOST_LAYERS,
    CalibrationFacts,
    CompensationFacts,
    LayerCut,
    ModelFacts,
    Plain,
    Ratio,
    Record,
    Training,
    Value,
    Values,
    as_number,
)

FORMAT: Literal[1] = 1
"""Version of results.json's layout."""

RESULTS = "results.json"

NOT_PRUNED = "none"
"""The strategy's name in results of ``prunekit evaluate`` on a model that nothing was cut from."""

REMEDY = "name a store written by prunekit ablate, or a folder written by prunekit run or prunekit demo"


class EvaluatorResult(Record):
    """What one evaluator measured, and the protocol that the values depend on."""

    evaluator: str
    label: str
    """The evaluator's name, numbered where a run lists several of one kind."""
    dense: Values | None = None
    pruned: Values
    protocol: Plain = Field(default_factory=dict)
    details: Plain = Field(default_factory=dict)
    """Values per layer, losses per window: of the ``dense`` and of the ``pruned`` model."""
    notes: list[str] = Field(default_factory=list)
    seconds: float = 0.0


DAMAGED = 3
"""Times the dense model's perplexity from which a model is called damaged."""


def damage(
    label: str, dense: Mapping[str, Value] | None, pruned: Mapping[str, Value], recovered: bool = False
) -> list[str]:
    """A sentence where the perplexity rose more than :data:`DAMAGED` times; else nothing."""
    before, after = (as_number((values or {}).get("perplexity")) for values in (dense, pruned))
    if not isinstance(before, (int, float)) or not isinstance(after, (int, float)) or not after > DAMAGED * before:
        return []
    rise = f"{label} rose {after / before:.3g}x, from {number(before)} to {number(after)}"
    remedy = "train it longer" if recovered else "recover it (prunekit recover)"
    return [f"{rise}: the model is damaged; cut less, or {remedy}"]


class Seconds(Record):
    """Durations."""

    load: float | None = None
    prune: float | None = None
    total: float


class RunResult(Record):
    """Everything that one run found: the content of results.json."""

    format: Literal[1] = FORMAT
    started: str
    """ISO 8601, UTC."""
    strategy: str
    ratio: Ratio
    metrics: list[EvaluatorResult]
    model: ModelFacts
    calibration: CalibrationFacts | None = None
    compensation: CompensationFacts | None = None
    recovery: Training | None = None
    """The training after the cut, if there was any."""
    attention_unit: str
    layers: list[LayerCut] = Field(max_length=MOST_LAYERS)
    runtime: Plain = Field(default_factory=dict)
    seeds: dict[str, int] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    plugins: dict[str, list[str]] = Field(default_factory=dict)
    """Names of the components in use, by who provides them."""
    search: list[Plain] = Field(default_factory=list)
    """What an allocator that searches has recorded, step by step."""
    notes: list[str] = Field(default_factory=list)
    seconds: Seconds

    def metric(self, label: str) -> EvaluatorResult | None:
        """What the evaluator of that label measured, if it ran."""
        return next((found for found in self.metrics if found.label == label), None)


def damages(metrics: Iterable[EvaluatorResult], recovered: bool = False) -> list[str]:
    """A sentence for every perplexity that rose far; ``recovered``: whether the model was trained after the cut."""
    return [line for found in metrics for line in damage(found.label, found.dense, found.pruned, recovered)]


class ComparedRun(RunResult):
    """One run of a comparison."""

    pipeline: str
    """Its pipeline file, from the comparison's folder."""
    situation: str
    """The kind of text it was calibrated on."""


class Comparison(Record):
    """The content of the demo's results.json."""

    format: Literal[1] = FORMAT
    table: list[Plain] = Field(default_factory=list)
    runs: list[ComparedRun]


Read = TypeVar("Read", bound=BaseModel)


def parsed(kind: type[Read], data: Any) -> Read:
    """``data`` as a record; raises :class:`ValueError` with the place and the kind of the first mistake."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise ValueError(f"{place}: {brief(describe(problem))}{more}") from None


def read_results(folder: str | Path) -> RunResult | Comparison:
    """The results.json of a folder; raises :class:`SpecError` where there is none that can be read."""
    folder = Path(folder)
    path = folder / RESULTS
    if not folder.is_dir():
        raise SpecError(f"there is no folder {folder}; {REMEDY}")
    if not path.is_file():
        raise SpecError(f"{folder} is not a results folder (no {RESULTS} in it); {REMEDY}")
    try:
        data = read_json(path)
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read: {error}; run the pipeline again") from None
    if not isinstance(data, dict) or not ("runs" in data or "metrics" in data):
        raise SpecError(f"{path} holds no results (neither metrics nor runs); {REMEDY}")
    if data.get("format") != FORMAT:
        raise SpecError(
            f"{path} has format {data.get('format')!r}, this version of prunekit reads {FORMAT}; "
            "run the pipeline again, or use the version that wrote it"
        )
    try:
        return parsed(Comparison, data) if "runs" in data else parsed(RunResult, data)
    except ValueError as error:
        raise SpecError(f"{path} is damaged ({error}); run the pipeline again") from None
