"""Ablation files: what one says, and the trials that follow from it, validated before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...registry import Catalog, SpecError
from ..files.reader import Mistake, Mistakes, Place
from ..files.spec import PipelineSpec, SpecReader
from ..files.yaml_file import set_at
from ..runs.provenance import versions
from .axes import Draft, axes_of, grid, listed, read_axes
from .blame import blamed
from .fields import field_names
from .planned import Planned, identity, key_of
from .published import Published, StudyRecord, check_published
from .study_file import Source, read_study


class StudyFile(BaseModel):
    """The keys of an ablation file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str | None = Field(default=None, description="what reports call the study; the file's name by default")
    base: str | dict[str, Any] = Field(description="a pipeline, or the path of a pipeline file")
    vary: dict[Any, Any] = Field(
        default_factory=dict, description="axes: a field and its values, or a free name and labelled settings"
    )
    exclude: tuple[dict[Any, Any], ...] = Field(
        default=(), description="grid points to leave out, by their axis values"
    )
    trials: tuple[dict[Any, Any], ...] = Field(default=(), description="trials besides the grid, one by one")
    published: tuple[Published, ...] = Field(default=(), description="values from the literature, for reports")


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
    _drafts: list[Draft] = field(repr=False)
    _source: Source = field(repr=False)

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
        if not isinstance(content.get("vary", {}), dict):
            found = content.pop("vary")
            reader.mistake(("vary",), f"write axes as a mapping: prune.use: [pp, flap] (found {found!r:.60})")
        file = reader.model(StudyFile, content, ())
        known = field_names(catalog)
        axes = read_axes(source.axes(), known, reader.mistake)
        broken = _broken(reader.mistakes, known)
        untold = {*source.changed_axes, *broken}
        drafts = grid(axes, source.entries("exclude"), reader.mistake, untold)
        drafts += listed(source.entries("trials"), axes, known, reader.mistake, broken)
        if not drafts and not reader.mistakes:
            reader.mistake(("vary",), "no trials; vary a field, such as prune.ratio: [0.2, 0.4], or list trials")
        _check_settings_matter(source, drafts, reader.mistake)
        flawed = any(mistake.place[:1] in (("vary",), ("exclude",), ("trials",)) for mistake in reader.mistakes)
        specs = _validated(source, drafts, files, catalog, reader, broken)
        planned = _planned(drafts, specs, source.folder, (lambda *said: None) if flawed else reader.mistake)
        check_published(published, drafts, specs, untold, reader.mistake)
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
            drafts,
            source,
        )

    def refuse(self, found: Mapping[int, Sequence[Mistake]]) -> None:
        """Raise one :class:`SpecError` for mistakes of trials, by their place, at what causes them; none: nothing."""
        reader = SpecReader(self.catalog, self._source.folder)
        reader.mistakes = sorted(blamed(self._drafts, found), key=lambda said: self._source.order(said.place))
        reader.finish(str(self._source.path), self._source.at)

    def describe(self) -> StudyRecord:
        """What a store holds of the study."""
        return StudyRecord(
            title=self.title,
            file=self.file.name,
            axes=self.axes,
            published=self.published,
            base=self.base,
            text=self.text,
            versions=versions(),
        )


def _broken(mistakes: Iterable[Mistake], known: frozenset[str]) -> set[str]:
    """Axes with a mistake of their own; of misspelt fields those that were meant, too."""
    names = {str(mistake.place[1]) for mistake in mistakes if mistake.place[:1] == ("vary",) and mistake.place[1:]}
    meant = (get_close_matches(name, sorted(known), n=1) for name in names if name not in known)
    return names.union(*meant)


def _missing(mistake: Mistake) -> bool:
    return mistake.message.startswith(("is required", "name the Strategy;"))


def _validated(
    source: Source,
    drafts: list[Draft],
    files: list[Path],
    catalog: Catalog,
    reader: SpecReader,
    broken: Collection[str],
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
            # What a broken axis would have set is not missing.
            wrong += [mistake for mistake in mistakes.found if not (broken and _missing(mistake))]
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
