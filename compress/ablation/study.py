"""Ablation files: read with their base, and turned into trials that are validated before a model is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ...registry import Catalog, SpecError, near
from ..files.reader import Mistake, Mistakes, Place
from ..files.spec import DEFAULT_EVALUATORS, PipelineSpec, SpecReader, absolute, folder_of, no_plugin_file
from ..files.yaml_file import YamlFile, apply_settings, parse_place, read_yaml, set_at, yaml_value
from ..output.records import What
from ..runs.provenance import versions
from .grid import Draft, Report, axes_of, field_names, grid, listed, read_axes
from .mistakes import explain_mistakes
from .published import Published, StudyRecord, check_published
from .trials import Planned, identity, key_of

SMALLEST = "the smallest ablation file is  {base: {prune: {use: pp}}, vary: {prune.ratio: [0.2, 0.4]}}"


class StudyFile(BaseModel):
    """The keys of an ablation file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str | None = Field(default=None, description="the study's name in reports; the file's name by default")
    base: str | dict[str, Any] = Field(description="a pipeline, or the path of a pipeline file")
    vary: dict[Any, Any] = Field(
        default_factory=dict, description="axes: a field and its values, or a free name and labelled settings"
    )
    match: What | None = Field(
        default=None,
        description="parameters or flops: the match of every trial's pipeline, so that rows compare at equal cost",
    )
    exclude: tuple[dict[Any, Any], ...] = Field(
        default=(), description="grid points to leave out, by their axis values"
    )
    trials: tuple[dict[Any, Any], ...] = Field(default=(), description="trials besides the grid, one by one")
    published: tuple[Published, ...] = Field(default=(), description="values from the literature, for reports")


@dataclass
class Source:
    """An ablation file and its base, ``--set`` applied."""

    file: YamlFile
    base: dict[str, Any] = field(default_factory=dict)
    base_file: YamlFile | None = None
    changed: list[Place] = field(default_factory=list)
    """Places of the base that ``--set`` has changed."""
    changed_axes: set[str] = field(default_factory=set)

    @property
    def plugins(self) -> list[Path]:
        """The base's plugin files; raises :class:`SpecError` where they are not a list of files."""
        if "plugins" in self.file.data:  # without them every name that they bring would count as a mistake
            where = self.at(("plugins",))
            raise SpecError(f"{self.file.path}: {where}plugins: is a key of the base; write base: {{plugins: [...]}}")
        files = self.base.get("plugins") or []
        if not (isinstance(files, list) and all(isinstance(item, str) for item in files)):
            where = self.at(("base", "plugins"))
            raise SpecError(f"{self.file.path}: {where}base.plugins: expected a list of Python files (found {files!r})")
        for number, item in enumerate(files):
            if problem := no_plugin_file(item, (self.base_file or self.file).folder):
                where = self.at(("base", "plugins", number))
                raise SpecError(f"{self.file.path}: {where}base.plugins.{number}: {problem}")
        return [absolute(item, self.file.folder) for item in files]

    @property
    def axes(self) -> dict[Any, Any]:
        """``vary``; empty where it is absent or not a mapping."""
        found = self.file.data.get("vary")
        return found if isinstance(found, dict) else {}

    def entries(self, key: str) -> dict[int, dict[Any, Any]]:
        """The mappings in ``exclude`` or ``trials``, by their places."""
        found = self.file.data.get(key)
        items = enumerate(found if isinstance(found, list) else ())
        return {index: item for index, item in items if isinstance(item, dict)}

    def at(self, place: Place) -> str:
        """The file and line of a place, as a mistake begins."""
        if place[:1] == ("base",) and any(place[1 : 1 + len(changed)] == changed for changed in self.changed):
            return "--set "
        if place[:1] == ("vary",) and place[1:2] and place[1] in self.changed_axes:
            return "--set "
        inside, line = self._line(place)
        before = f"{self.base_file.path} " if inside and self.base_file else ""
        return "" if line is None else f"{before}line {line}: "

    def order(self, place: Place) -> tuple[bool, int]:
        """Sort key: by line; what is in the base's own file comes last."""
        return bool(self.base_file) and place[:1] == ("base",), self._line(place)[1] or 0

    def _line(self, place: Place) -> tuple[bool, int | None]:
        """Whether a place is in the base's own file, and its line there or in the study's file."""
        if self.base_file and place[:1] == ("base",) and place[1:]:
            line = self.base_file.line(place[1:])
            if line is not None:
                return True, line
        return False, self.file.line(place)


def read_study(path: str | Path | YamlFile, settings: Iterable[str] = ()) -> Source:
    """The file and its base; raises :class:`SpecError` for files that cannot be read and settings that do not apply.

    A setting changes the base (``prune.ratio=0.2``), an axis (``vary.prune.ratio=[0.2]``, null for none) or the title.
    """
    source = Source(read_yaml(path, "ablation file", SMALLEST))
    place = f"{source.file.path}: {source.at(('base',))}base"
    _drop_empty(source.file.data)
    base = source.file.data.get("base")
    if isinstance(base, str):
        try:
            source.base_file = read_yaml(absolute(base, source.file.folder))
        except SpecError as error:
            raise SpecError(f"{place}: {error}") from None
        base = _anchored(source.base_file.data, source.base_file.folder)
    elif base is None and "prune" in source.file.data:
        raise SpecError(f"{source.file.path} is a pipeline file; use prunekit run {source.file.path}")
    elif base is None:
        raise SpecError(
            f"{source.file.path}: base: is required: a pipeline or a pipeline file's path, such as "
            "base: {prune: {use: pp}}"
        )
    elif not isinstance(base, Mapping):
        raise SpecError(f"{place}: expected a pipeline, or a pipeline file's path (found {base!r:.60})")
    source.base = dict(base)
    if source.base.get("evaluate") is None:
        source.base["evaluate"] = list(DEFAULT_EVALUATORS)
    for setting in settings:
        _apply(source, setting)
    _drop_empty(source.base)
    return source


def _drop_empty(sections: dict[str, Any]) -> None:
    for section in [key for key, value in sections.items() if value is None]:
        del sections[section]


def _apply(source: Source, setting: str) -> None:
    name, equals, text = setting.partition("=")
    head, _, axis = name.partition(".")
    if head in PipelineSpec.model_fields:
        source.changed += apply_settings(source.base, [setting])
        return
    if not equals or not (name == "title" or (head == "vary" and axis)):
        known = [*PipelineSpec.model_fields, "vary.AXIS", "title"]
        raise SpecError(f"--set {setting}: there is no {name!r}{near(head, known)}; there are {', '.join(known)}")
    value = yaml_value(setting, text)
    if name == "title":
        source.file.data["title"] = value
        return
    source.changed_axes.add(axis)
    axes = source.file.data.setdefault("vary", {})
    if isinstance(axes, dict):
        axes[axis] = value
        if value is None:
            del axes[axis]


def _anchored(value: Any, folder: Path, key: Any = None) -> Any:
    """A base file's data with absolute paths: they start at that file's folder, not at the study's."""
    if isinstance(value, dict):
        found = {inner: _anchored(item, folder, inner) for inner, item in value.items()}
        if key == "model":
            found |= {name: folder_of(found[name], folder) for name in ("name", "tokenizer") if name in found}
        return found
    if isinstance(value, list):
        return [_anchored(item, folder, key) for item in value]
    if key == "model" and isinstance(value, str):
        return folder_of(value, folder)
    return str(absolute(value, folder)) if key in ("file", "plugins") and isinstance(value, str) else value


@dataclass(frozen=True)
class Study:
    """A base pipeline and its variations; made by :meth:`load`."""

    title: str
    file: Path
    axes: dict[str, list[Any]]
    """Values (labels, for an axis of a free name) by axis, those of listed trials included."""
    published: tuple[Published, ...]
    trials: tuple[Planned, ...] = field(repr=False)
    catalog: Catalog = field(repr=False)
    _drafts: list[Draft] = field(repr=False)
    _source: Source = field(repr=False)

    @classmethod
    def load(
        cls, path: str | Path | YamlFile, settings: Iterable[str] = (), plugins: Iterable[str | Path] = ()
    ) -> Study:
        """Read an ablation file, changed by ``settings`` as of ``--set``; ``plugins`` come before the base's own.

        Raises :class:`SpecError` naming every mistake of the file and of all its trials with its place, and
        :class:`PluginError` for a plugin file that does not load.
        """
        source = read_study(path, settings)
        files = [*(Path(file).resolve() for file in plugins), *source.plugins]
        catalog = Catalog.discover(dict.fromkeys(files))
        reader = SpecReader(catalog, source.file.folder)
        content = {**source.file.data, "base": source.base}
        published: list[Published] = []
        if isinstance(content.get("published"), list):  # one by one, so that a wrong one does not hide the others
            entries = [
                reader.model(Published, entry, ("published", index)) for index, entry in enumerate(content["published"])
            ]
            content["published"] = published = [entry for entry in entries if entry is not None]
        if not isinstance(content.get("vary", {}), dict):
            found = content.pop("vary")
            reader.mistake(("vary",), f"write axes as a mapping: prune.use: [pp, flap] (found {found!r:.60})")
        for key in [key for key in content if key in PipelineSpec.model_fields and key not in StudyFile.model_fields]:
            del content[key]
            reader.mistake((key,), f"is a key of the base; write it under base: base: {{{key}: ...}}")
        file = reader.model(StudyFile, content, ())
        known = field_names(catalog)
        axes = read_axes(source.axes, known, reader.mistake)
        broken = _broken_axes(reader.mistakes, known)
        ignored = {*source.changed_axes, *broken}
        drafts = grid(axes, source.entries("exclude"), reader.mistake, ignored)
        drafts += listed(source.entries("trials"), axes, known, reader.mistake, broken)
        if not drafts and not reader.mistakes:
            reader.mistake(("vary",), "no trials; vary a field, such as prune.ratio: [0.2, 0.4], or list trials")
        for place in source.changed:
            name = ".".join(map(str, place))
            if drafts and all(name in draft.fields for draft in drafts):
                instead = "change its axis instead, with --set vary.AXIS=[...]"
                reader.mistake(("base", *place), f"every trial sets {name}; {instead}")
        flawed = any(mistake.place[:1] in (("vary",), ("exclude",), ("trials",)) for mistake in reader.mistakes)
        match = None if file is None else file.match
        if match is not None and source.base.get("match") is not None:
            reader.mistake(("match",), "base has a match, too; keep one of them")
        specs = _validated(source, {"match": match, **source.base}, drafts, files, reader, broken)
        trials = _planned(drafts, specs, source.file.folder, None if flawed else reader.mistake)
        check_published(published, drafts, specs, ignored, reader.mistake)
        reader.mistakes.sort(key=lambda mistake: source.order(mistake.place))
        file = reader.result(file, str(source.file.path), source.at)
        return cls(
            title=file.title or source.file.path.stem,
            file=source.file.path.resolve(),
            axes={name: [point.value for point in points] for name, points in axes_of(drafts).items()},
            published=tuple(published),
            trials=trials,
            catalog=catalog,
            _drafts=drafts,
            _source=source,
        )

    def refuse(self, found: Mapping[int, Sequence[Mistake]]) -> None:
        """Raise one :class:`SpecError` for mistakes of trials, by their place, at what causes them; none: nothing."""
        reader = SpecReader(self.catalog, self._source.file.folder)
        mistakes = explain_mistakes(self._drafts, found)
        reader.mistakes = sorted(mistakes, key=lambda mistake: self._source.order(mistake.place))
        if reader.mistakes:
            reader.result(None, str(self._source.file.path), self._source.at)

    def describe(self) -> StudyRecord:
        """What a store holds of the study."""
        return StudyRecord(
            title=self.title,
            file=self.file.name,
            axes=self.axes,
            published=self.published,
            base=self._source.base,
            text=self._source.file.text,
            versions=versions(),
        )


def _broken_axes(mistakes: Iterable[Mistake], known: frozenset[str]) -> set[str]:
    """Axes with a mistake of their own; for a misas_text field also the field that was meant."""
    names = {str(mistake.place[1]) for mistake in mistakes if mistake.place[:1] == ("vary",) and mistake.place[1:]}
    meant = (get_close_matches(name, sorted(known), n=1) for name in names if name not in known)
    return names.union(*meant)


def _validated(
    source: Source,
    base: dict[str, Any],
    drafts: list[Draft],
    files: list[Path],
    reader: SpecReader,
    broken: Collection[str],
) -> dict[int, PipelineSpec]:
    """The pipelines of all trials by their place; a mistake that trials share is reported once."""
    specs: dict[int, PipelineSpec] = {}
    found: dict[int, Sequence[Mistake]] = {}
    for index, draft in enumerate(drafts):
        data = deepcopy(base)
        data.pop("output", None)
        data["plugins"] = files
        wrong: list[Mistake] = []
        for name, value in draft.fields.items():
            place = parse_place(name)
            try:
                set_at(data, place, deepcopy(value), name)
            except SpecError as error:
                wrong.append(Mistake(place, str(error).removeprefix(f"{name}: ")))
        try:
            specs[index] = PipelineSpec.of(data, folder=source.file.folder, catalog=reader.catalog)
        except Mistakes as mistakes:
            # What a broken axis would have set is not missing.
            missing = ("is required", "name the Strategy;")
            wrong += [each for each in mistakes.found if not (broken and each.message.startswith(missing))]
        if wrong:
            specs.pop(index, None)
            found[index] = wrong
    reader.mistakes += explain_mistakes(drafts, found)
    # One length for all trials, also for those without a history: otherwise they could not be compared.
    longest = min((spec.positions for spec in specs.values() if spec.positions is not None), default=None)
    return {index: spec.with_rows(longest) for index, spec in specs.items()}


def _planned(
    drafts: list[Draft], specs: Mapping[int, PipelineSpec], folder: Path, report: Report | None
) -> tuple[Planned, ...]:
    """The trials with their keys; a trial that repeats another's pipeline is left out, and reported."""
    planned: dict[str, Planned] = {}
    for index, spec in specs.items():
        pipeline = identity(spec, folder)
        trial = Planned(index + 1, key_of(pipeline), drafts[index].settings, spec, pipeline)
        first = planned.setdefault(trial.key, trial)
        if first is not trial and report:
            report(
                drafts[index].place,
                f"trial {trial.number} ({trial.label}) is the same pipeline as trial {first.number} ({first.label}); "
                "leave one out",
            )
    return tuple(planned.values())
