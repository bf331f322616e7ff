"""Published values of a study, and the checks that they belong to trials and measurements of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...registry import near
from ..files.dotted import resolved_settings
from ..files.reader import Place
from ..files.spec import PipelineSpec
from ..output.folders import plain
from .grid import Axes, Draft, Report, axes_of, check_settings, matches
from .trials import StoredTrial, as_text


class Published(BaseModel):
    """A value from the literature that belongs to some of the trials."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: dict[str, Any] = Field(
        description="axis values, or fields of the pipeline, of the trials that it belongs to; {} is all of them"
    )
    metric: str = Field(description="EVALUATOR.VALUE, such as perplexity.perplexity")
    value: float = Field(description="the published number")
    source: str = Field(description="where it was published, such as PP, Table 1")
    dense: bool = Field(default=False, description="whether it is the unpruned model's")


class StudyRecord(BaseModel):
    """What a store holds of its study."""

    model_config = ConfigDict(frozen=True)

    title: str | None = None
    file: str = ""
    axes: Annotated[dict[str, list[Any]], BeforeValidator(plain)]
    """Values (labels, for an axis of a free name) by axis."""
    published: tuple[Published, ...] = ()
    base: Annotated[dict[str, Any], BeforeValidator(plain)] = Field(default_factory=dict)
    text: str | None = None
    """The file as it was read."""
    versions: dict[str, str] = Field(default_factory=dict)
    started: str = ""
    """ISO 8601, UTC."""


def check_published(
    published: Sequence[Published],
    drafts: Sequence[Draft],
    specs: Mapping[int, PipelineSpec],
    ignored: Collection[str],
    report: Report,
) -> None:
    """Report entries without a trial, or without an evaluator of their trials; ``ignored`` axes are not checked."""
    from ..runs.pipeline import labelled

    axes = axes_of(drafts)
    resolved: dict[int, dict[str, Any]] = {}
    if any(name not in draft.settings for draft in drafts for entry in published for name in entry.where):
        resolved = {number: resolved_settings(spec.to_yaml()) for number, spec in specs.items()}
    for index, entry in enumerate(published):
        place: Place = ("published", index)
        if not drafts or not _check_where(entry.where, (*place, "where"), axes, resolved, ignored, report):
            continue
        numbers = [number for number, draft in enumerate(drafts) if _applies(entry, draft, resolved.get(number, {}))]
        if not numbers and not ignored and len(specs) == len(drafts):
            report((*place, "where"), "no trial has all of these values")
        labels = {label: None for number in numbers if number in specs for label, _ in labelled(specs[number].evaluate)}
        label, _, value = entry.metric.rpartition(".")
        if not (label and value):
            report((*place, "metric"), f"write EVALUATOR.VALUE, such as perplexity.perplexity (found {entry.metric!r})")
        elif labels and label not in labels:
            report(
                (*place, "metric"),
                f"no evaluator of its trials is called {label!r}{near(label, labels)}; there are {', '.join(labels)}",
            )


def _check_where(
    where: Mapping[str, Any],
    place: Place,
    axes: Axes,
    resolved: Mapping[int, Mapping[str, Any]],
    ignored: Collection[str],
    report: Report,
) -> bool:
    """Whether every name is an axis that has the value, or a field of the pipelines; reports what is not."""
    fields: dict[str, set[str]] = {}
    for settings in resolved.values():
        for name in where.keys() & settings.keys():
            fields.setdefault(name, set()).add(as_text(settings[name]))

    def known(name: str, value: Any) -> bool:  # an axis of listed trials alone has the base's value in the others
        return name in fields and (name not in axes or as_text(value) in fields[name])

    others = {name: value for name, value in where.items() if not known(name, value)}
    return check_settings(others, place, axes, report, ignored)


def _applies(entry: Published, draft: Draft, resolved: Mapping[str, Any]) -> bool:
    """Whether the trial has the values, in its settings or else in its resolved pipeline."""
    settings = draft.settings
    return matches(entry.where, settings if set(entry.where) <= set(settings) else {**resolved, **settings})


def unmeasured(published: Sequence[Published], trials: Iterable[StoredTrial]) -> Iterator[str]:
    """A message for every entry whose value is not among those that its evaluator measured."""
    names: dict[str, dict[str, None]] = {}
    for trial in trials:
        for metric in trial.result.metrics if trial.result else ():
            names.setdefault(metric.label, {}).update(dict.fromkeys(metric.pruned))
    for index, entry in enumerate(published):
        label, _, value = entry.metric.rpartition(".")
        if label in names and value not in names[label]:
            there = ", ".join(names[label])
            yield f"published.{index}.metric: {label} has no value {value}{near(value, names[label])}; it has {there}"
