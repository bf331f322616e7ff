"""Ablation files: what one says, and the trials that follow from it, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...registry import Catalog, SpecError, near
from ..building import Mistake, Mistakes, Place
from ..provenance import versions
from ..spec import PipelineSpec, SpecReader
from ..yaml_file import set_at
from .axes import Draft, axes_of, check_settings, grid, listed, matches, read_axes
from .blame import blamed
from .fields import field_names
from .planned import Planned, identity, key_of
from .study_file import Source, read_study


class Published(BaseModel):
    """A value from the literature that belongs to some of the trials."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: dict[str, Any] = Field(description="axis values of the trials that it belongs to; {} is all of them")
    metric: str = Field(description="EVALUATOR.VALUE, such as perplexity.perplexity")
    value: float = Field(description="the published number")
    source: str = Field(description="where it was published, such as PP, Table 1")
    dense: bool = Field(False, description="whether it is the unpruned model's")


class StudyFile(BaseModel):
    """The keys of an ablation file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str | None = Field(None, description="what reports call the study; the file's name by default")
    base: str | dict[str, Any] = Field(description="a pipeline, or the path of a pipeline file")
    vary: dict[Any, Any] = Field(
        default_factory=dict, description="axes: a field and its values, or a free name and labelled settings"
    )
    exclude: tuple[dict[Any, Any], ...] = Field((), description="grid points to leave out, by their axis values")
    trials: tuple[dict[Any, Any], ...] = Field((), description="trials besides the grid, one by one")
    published: tuple[Published, ...] = Field((), description="values from the literature, for reports")


@dataclass(frozen=True)
class Study:
    """A base pipeline and its variations; made by :meth:`load`."""

    title: str
    file: Path
    text: str
    """The file as it was read."""
    base: dict[str, Any] = field(repr=False)
    axes: dict[str, list[Any]]
    """Values (labels, for an axis of a free name) by axis, those of listed trials included."""
    published: tuple[Published, ...]
    trials: tuple[Planned, ...] = field(repr=False)
    catalog: Catalog = field(repr=False)

    @classmethod
    def load(cls, path: str | Path, settings: Iterable[str] = (), plugins: Iterable[str | Path] = ()) -> Study:
        """Read an ablation file, changed by ``--set`` like ``settings``; ``plugins`` come before the base's own.

        Raises :class:`SpecError` naming every mistake of the file and of all its trials with its place, and
        :class:`PluginError` for a plugin file that does not load.
        """
        source = read_study(Path(path), settings)
        files = [*(Path(file).resolve() for file in plugins), *source.plugins]
        catalog = Catalog.discover(dict.fromkeys(files))
        reader = SpecReader(catalog, source.folder)
        content = {**source.data, "base": source.base}
        published: list[Published] = []
        if isinstance(content.get("published"), list):  # one by one: the others are checked although one is wrong
            entries = [
                reader.model(Published, entry, ("published", index)) for index, entry in enumerate(content["published"])
            ]
            content["published"] = published = [entry for entry in entries if entry is not None]
        file = reader.model(StudyFile, content, ())
        known = field_names(catalog)
        axes = read_axes(source.axes(), known, reader.mistake)
        drafts = grid(axes, source.entries("exclude"), reader.mistake, source.changed_axes)
        drafts += listed(source.entries("trials"), axes, known, reader.mistake)
        if not drafts and not reader.mistakes:
            reader.mistake(("vary",), "no trials; vary a field, such as prune.ratio: [0.2, 0.4], or list trials")
        _check_settings_matter(source, drafts, reader.mistake)
        specs = _validated(source, drafts, files, catalog, reader)
        planned = _planned(drafts, specs, source.folder, reader.mistake)
        _check_published(published, drafts, specs, source.changed_axes, reader.mistake)
        reader.mistakes.sort(key=lambda mistake: source.order(mistake.place))
        reader.finish(str(path), source.at)
        values = {name: [point.value for point in points] for name, points in axes_of(drafts).items()}
        return cls(
            file.title or Path(path).stem,
            Path(path).resolve(),
            source.text,
            source.base,
            values,
            tuple(published),
            planned,
            catalog,
        )

    def describe(self) -> dict[str, Any]:
        """What a store says about the study."""
        return {
            "title": self.title,
            "file": self.file.name,
            "axes": self.axes,
            "published": [published.model_dump() for published in self.published],
            "base": self.base,
            "text": self.text,
            "versions": versions(),
        }


def _validated(
    source: Source, drafts: list[Draft], files: list[Path], catalog: Catalog, reader: SpecReader
) -> dict[int, PipelineSpec]:
    """The pipelines of all trials by their place; mistakes are said once for all trials that share them."""
    specs: dict[int, PipelineSpec] = {}
    found: dict[int, Sequence[Mistake]] = {}
    for index, draft in enumerate(drafts):
        data = deepcopy(source.base)
        data.pop("output", None)
        data["plugins"] = files
        wrong: list[Mistake] = []
        for name, value in draft.fields.items():
            place = tuple(int(part) if part.isdigit() else part for part in name.split("."))
            try:
                set_at(data, place, deepcopy(value), name)
            except SpecError as error:
                wrong.append(Mistake(place, str(error).removeprefix(f"{name}: ")))
        try:
            specs[index] = PipelineSpec.of(data, folder=source.folder, catalog=catalog)
        except Mistakes as mistakes:
            wrong += mistakes.found
        if wrong:
            specs.pop(index, None)
            found[index] = wrong
    reader.mistakes += blamed(drafts, found)
    return specs


def _planned(
    drafts: list[Draft], specs: Mapping[int, PipelineSpec], folder: Path, complain: Callable[[Place, str], None]
) -> tuple[Planned, ...]:
    """The trials with their keys; two that are the same pipeline are refused."""
    planned: dict[str, Planned] = {}
    for index, spec in specs.items():
        pipeline = identity(spec, folder)
        trial = Planned(index + 1, key_of(pipeline), drafts[index].settings, spec, pipeline)
        first = planned.setdefault(trial.key, trial)
        if first is not trial:
            complain(
                drafts[index].place,
                f"trial {trial.number} ({trial.label}) is the same pipeline as trial {first.number} ({first.label}); "
                "leave one out",
            )
    return tuple(planned.values())


def _check_settings_matter(source: Source, drafts: list[Draft], complain: Callable[[Place, str], None]) -> None:
    """A field set by ``--set`` that every trial sets again would change nothing."""
    for place in source.changed:
        name = ".".join(map(str, place))
        if drafts and all(name in draft.fields for draft in drafts):
            complain(("base", *place), f"every trial sets {name}; change its axis instead, with --set vary.AXIS=[...]")


def _check_published(
    published: Iterable[Published],
    drafts: list[Draft],
    specs: Mapping[int, PipelineSpec],
    changed: Collection[str],
    complain: Callable[[Place, str], None],
) -> None:
    """An entry that belongs to no trial, or to no evaluator of its trials, is a slip of the pen."""
    from ..pipeline import labelled

    axes = axes_of(drafts)
    for index, entry in enumerate(published):
        place: Place = ("published", index)
        if not drafts or not check_settings(entry.where, (*place, "where"), axes, complain, changed):
            continue
        trials = [number for number, draft in enumerate(drafts) if matches(entry.where, draft.settings)]
        if not trials and not changed:
            complain((*place, "where"), "no trial has all of these values")
        labels = {label: None for number in trials if number in specs for label, _ in labelled(specs[number].evaluate)}
        label, _, value = entry.metric.rpartition(".")
        if not (label and value):
            complain(
                (*place, "metric"), f"write EVALUATOR.VALUE, such as perplexity.perplexity (found {entry.metric!r})"
            )
        elif labels and label not in labels:
            complain(
                (*place, "metric"),
                f"no evaluator of its trials is called {label!r}{near(label, labels)}; there are {', '.join(labels)}",
            )
