"""The sections of a pipeline file as pydantic models, and how a file is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from ...registry import Catalog, Evaluator, SpecError, Strategy, TextSource, near
from ...registry.text import is_saved_dataset, without_defaults
from ..bundled import TEXTS
from ..calibration.generated import Generated
from ..engine.runtime import Runtime
from ..models.likeness import Like
from ..models.named import BUNDLED, MODELS
from ..models.source import ModelSource
from ..output.reading import path_problem, shown
from ..output.records import Of, What
from .reader import Mistake, Model, Place, Reader, seed_parts, with_rows, with_seed
from .recover import Recover
from .yaml_file import YamlFile, apply_settings, read_yaml
from .yaml_plain import Dumper

DEFAULT_EVALUATORS = ("perplexity", "cost")

LATER = {"recover": None}
"""Sections newer than stored results, with their defaults, which are not written: keys of trials stay equal."""


class CalibrationText(TextSource):
    """One text to calibrate on: one that is read, or ``generated``."""

    places: ClassVar[tuple[str, ...]] = (*TextSource.places, "generated")

    generated: Generated | None = Field(
        default=None, description="the text that the model itself generates before it is pruned; {} with all defaults"
    )

    @model_validator(mode="before")
    @classmethod
    def _of_a_source(cls, data: Any) -> Any:
        return data.model_dump(exclude_unset=True) if type(data) is TextSource else data

    @model_validator(mode="after")
    def _not_read(self) -> CalibrationText:
        reads = [key for key in TextSource.model_fields if key in self.model_fields_set - set(self.places)]
        given = [key for key in reads if getattr(self, key) != TextSource.model_fields[key].default]
        if self.generated is not None and given:
            raise ValueError(f"{given[0]} is of texts that are read, and generated text is not; leave one of them out")
        return self

    @property
    def label(self) -> str:
        """The text's name in reports."""
        return super().label if self.generated is None else self.generated.label


class Calibration(CalibrationText):
    """The text that static decisions and PP's history are calibrated on; the bundled text by default."""

    places: ClassVar[tuple[str, ...]] = (*CalibrationText.places, "mixture")

    bundled: str | None = Field(
        default=None, description="a bundled text; reference-calibration where no other text is given"
    )
    mixture: tuple[CalibrationText, ...] | None = Field(
        default=None,
        description="several texts, such as [{bundled: reference-calibration}, {file: mine.txt}], each with an equal "
        "share of the sequences",
    )
    sequences: int = Field(default=32, ge=1, description="number of sequences; text that holds fewer is refused")
    length: int = Field(
        default=512,
        ge=1,
        description="tokens of a sequence; never shortened: longer than the model's context is refused",
    )
    batch_size: int = Field(default=8, ge=1, description="sequences run at once; the result does not depend on it")
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the places that sequences are taken from, or of generated text"
    )
    statistics: Path | None = Field(
        default=None,
        description="a .safetensors file that the statistics are written to, or read from where it is there; one of "
        "another model or text is refused",
    )

    @model_validator(mode="before")
    @classmethod
    def _bundled_by_default(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not any(data.get(key) is not None for key in cls.places):
            return {**data, "bundled": "reference-calibration"}
        return data

    @field_validator("mixture")
    @classmethod
    def _each_text_once(cls, mixture: tuple[CalibrationText, ...] | None) -> tuple[CalibrationText, ...] | None:
        for place, source in enumerate(mixture or ()):
            if source in (mixture or ())[:place]:
                raise ValueError(f"{source.label} is named twice, and would give the same sequences twice")
        return mixture

    @model_validator(mode="after")
    def _a_sequence_of_each(self) -> Calibration:
        if self.sequences < len(self.mixture or ()):
            raise ValueError(
                f"sequences: {self.sequences} cannot be shared by the {len(self.mixture or ())} texts of mixture; "
                f"set it to {len(self.mixture or ())} or more"
            )
        return self

    @property
    def sources(self) -> tuple[CalibrationText, ...]:
        """The texts alone, without how they are cut up."""
        return self.mixture or (CalibrationText(**{key: getattr(self, key) for key in CalibrationText.model_fields}),)

    @property
    def label(self) -> str:
        """The name of the text, or of all texts of the mixture, in reports."""
        return " + ".join(source.label for source in self.sources)


class Output(BaseModel):
    """Where results go and what they hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: str | None = Field(default=None, description="results folder; results/STRATEGY-RATIO-TIME where not given")
    trace: bool = Field(default=False, description="write every pruning decision to decisions.jsonl")
    overwrite: bool = Field(default=False, description="replace an existing results folder")


class PipelineSpec(BaseModel):
    """A whole pipeline file; ``prune: {use: pp, ratio: 0.4}`` alone is one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plugins: tuple[Path, ...] = Field(
        default=(), description="Python files with plugins, relative to the pipeline file"
    )
    model: ModelSource = Field(
        default_factory=ModelSource, description="the model, or its name alone; the bundled one by default"
    )
    calibration: Calibration = Field(default_factory=Calibration, description="the text to calibrate on")
    prune: Strategy = Field(description="the strategy and the ratio, such as {use: pp, ratio: 0.4}")
    recover: Recover | None = Field(
        default=None,
        description="train the pruned model with LoRA, and measure the result; for a cut that is made once. null: no "
        "training; {} with all defaults",
    )
    evaluate: tuple[Evaluator, ...] = Field(
        description=f"measurements, dense and pruned; {' and '.join(DEFAULT_EVALUATORS)} by default",
        json_schema_extra={"minItems": 1},
    )
    runtime: Runtime = Field(default_factory=Runtime, description="how a pruned model computes, not what")
    output: Output = Field(default_factory=Output, description="the results folder")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of parts that name none; 0: their own defaults")
    match: What | None = Field(
        default=None,
        description="parameters or flops: raise or lower the strategy's ratio until its decoder costs 1 - ratio of the "
        "dense decoder's, within 0.5%",
    )

    architecture: Like | None = Field(
        default=None,
        description="for a model of an unknown type: the family whose names its layers have, such as {like: llama}; "
        "checked on the model before anything is pruned",
    )

    _catalog: Catalog | None = PrivateAttr(None)

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: Any) -> dict[str, Any]:
        return without_defaults(handler(self), LATER)

    @field_validator("recover")
    @classmethod
    def _can_be_recovered(cls, recover: Recover | None, info: ValidationInfo) -> Recover | None:
        strategy, calibration = info.data.get("prune"), info.data.get("calibration")
        if recover is not None and isinstance(strategy, Strategy) and isinstance(calibration, Calibration):
            recover.check(strategy, generated=any(source.generated is not None for source in calibration.sources))
        return recover

    @field_validator("evaluate")
    @classmethod
    def _measures_something(cls, evaluate: tuple[Evaluator, ...]) -> tuple[Evaluator, ...]:
        if not evaluate:
            raise ValueError("name at least one evaluator (found []); prunekit list evaluators names them")
        return evaluate

    @field_validator("match")
    @classmethod
    def _can_be_matched(cls, match: What | None, info: ValidationInfo) -> What | None:
        strategy = info.data.get("prune")
        if match is None or not isinstance(strategy, Strategy):
            return match
        if not strategy.allocator.takes_ratio:
            raise ValueError(
                f"{match} cannot be matched: allocator {strategy.allocator.name} takes no ratio that could be raised "
                "or lowered; use another allocator, or leave match out"
            )
        if match == "flops" and not strategy.applier.resizes:
            raise ValueError(
                f"flops cannot be matched: applier {strategy.applier.name} computes all units at any ratio; use "
                "applier slice, or match: parameters"
            )
        return match

    @property
    def catalog(self) -> Catalog:
        """The components that the spec was read with; with ``architecture``, of all architectures that one alone."""
        found = self._catalog or Catalog.discover(self.plugins)
        return found if self.architecture is None else self.architecture.only(found)

    @classmethod
    def load(
        cls,
        path: str | Path | YamlFile,
        settings: Iterable[str] = (),
        plugins: Iterable[str | Path] = (),
        check: Callable[[PipelineSpec], Iterable[Mistake]] = lambda spec: (),
    ) -> PipelineSpec:
        """Read a pipeline file, changed by ``settings`` as of ``--set``; ``plugins`` come before the file's own.

        ``check`` finds more mistakes in what was read. Raises :class:`SpecError` naming every mistake with its place,
        and :class:`PluginError` for a plugin file that does not load.
        """
        file = read_yaml(path)
        data = file.data
        if data.get("evaluate") is None:
            data["evaluate"] = list(DEFAULT_EVALUATORS)  # so that --set evaluate.0.window=256 finds it
        changed = apply_settings(data, settings)

        def at(place: Place) -> str:
            if any(place[: len(setting)] == setting for setting in changed):
                return "--set "
            line = file.line(place)
            return "" if line is None else f"line {line}: "

        return cls.of(data, folder=file.folder, plugins=plugins, label=str(file.path), at=at, check=check)

    @classmethod
    def of(
        cls,
        data: Mapping[str, Any],
        folder: Path | None = None,
        plugins: Iterable[str | Path] = (),
        catalog: Catalog | None = None,
        label: str = "pipeline",
        at: Callable[[Place], str] = lambda place: "",
        check: Callable[[PipelineSpec], Iterable[Mistake]] = lambda spec: (),
    ) -> PipelineSpec:
        """The spec that a pipeline file with this content would give; relative paths start at ``folder``."""
        folder = folder or Path.cwd()
        listed = data.get("plugins") or []
        if not (isinstance(listed, (list, tuple)) and all(isinstance(item, (str, Path)) for item in listed)):
            found = shown(listed)
            raise SpecError(f"{label}: {at(('plugins',))}plugins: expected a list of Python files (found {found})")
        for item in listed:
            if problem := path_problem(item):
                raise SpecError(f"{label}: {at(('plugins',))}plugins: {problem} (found {shown(item)})")
        for number, item in enumerate(listed if catalog is None else ()):
            if problem := no_plugin_file(item, folder):
                raise SpecError(f"{label}: {at(('plugins', number))}plugins.{number}: {problem}")
        files = list(dict.fromkeys([*(Path(p).resolve() for p in plugins), *(absolute(p, folder) for p in listed)]))
        reader = SpecReader(catalog or Catalog.discover(files), folder)
        data = dict(data, plugins=files)
        for section in [key for key, value in data.items() if value is None]:
            del data[section]
        _take_of(data, reader)
        data.setdefault("evaluate", list(DEFAULT_EVALUATORS))
        spec = reader.result(reader.model(cls, data, ()), label, at)
        seeded = {
            "calibration": with_seed(spec.calibration, spec.seed),
            "prune": seed_parts(with_seed(spec.prune, spec.seed)),
            "evaluate": tuple(with_seed(evaluator, spec.seed) for evaluator in spec.evaluate),
            "recover": None if spec.recover is None else with_seed(spec.recover, spec.seed),
        }
        spec = spec.model_copy(update=seeded)
        spec = spec.with_rows(spec.positions)
        spec._catalog = reader.catalog
        reader.mistakes += check(spec)
        return reader.result(spec, label, at)

    @property
    def positions(self) -> int | None:
        """Positions of the histories, which no row may exceed: the calibration's length; None without histories."""
        return self.calibration.length if self.prune.refuses_long_batches else None

    @property
    def training_texts(self) -> tuple[TextSource, ...]:
        """The texts that are trained on after the cut: those of the calibration, where no other one is named."""
        if self.recover is None:
            return ()
        return self.calibration.sources if self.recover.text is None else (self.recover.text,)

    def with_rows(self, longest: int | None) -> PipelineSpec:
        """The spec with rows of at most ``longest`` tokens in the evaluators whose row option is left out."""
        if longest is None:
            return self
        return self.model_copy(update={"evaluate": tuple(with_rows(each, longest) for each in self.evaluate)})

    def to_yaml(self) -> str:
        """The pipeline file with every default written out; it gives the same results, in a new folder."""
        data = self.model_dump(mode="json", serialize_as_any=True)
        data["prune"] = {"use": data["prune"].pop("name"), **data["prune"]}
        data["output"] = {"dir": None, "trace": self.output.trace, "overwrite": False}
        return yaml.dump(data, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)


def _take_of(data: dict[str, Any], reader: Reader) -> None:
    """Replace ``of: decoder`` in the section ``prune`` by ``match: parameters``, which it means."""
    prune = data.get("prune")
    if not isinstance(prune, Mapping) or "of" not in prune:
        return
    data["prune"] = {key: value for key, value in prune.items() if key != "of"}
    found = prune["of"]
    if found not in get_args(Of):
        reader.mistake(("prune", "of"), f"a ratio is one of {' or '.join(get_args(Of))} (found {shown(found)})")
    elif found == "decoder" and data.setdefault("match", "parameters") != "parameters":
        reader.mistake(("prune", "of"), "decoder counts parameters, and match another cost; leave one of them out")


NAMES_OF_FOLDERS = {(ModelSource, key) for key in ("name", "gguf", "tokenizer", "offload_folder")} | {(Output, "dir")}
"""Texts that may be paths."""


class SpecReader(Reader):
    """Also makes paths absolute and looks for the texts that are named."""

    def __init__(self, catalog: Catalog, folder: Path):
        super().__init__(catalog)
        self.folder = folder

    def model(self, cls: type[Model], raw: Any, place: Place, base: BaseModel | None = None) -> Model | None:
        if isinstance(raw, Mapping):
            raw = {key: value for key, value in raw.items() if not self._refused(cls, key, value, place)}
        if isinstance(raw, Mapping) and issubclass(cls, TextSource):
            raw = self._text(dict(raw), place)
        if cls is Like and isinstance(raw, Mapping) and isinstance(raw.get("like"), str):
            try:
                Like(like=raw["like"]).entry(self.catalog)
            except SpecError as error:
                self.mistake((*place, "like"), str(error))
        if cls is ModelSource and isinstance(raw, str):
            raw = {"name": raw}
        if isinstance(raw, Mapping) and cls is ModelSource:
            folders = {key: folder_of(raw[key], self.folder) for key in ("name", "tokenizer") if key in raw}
            raw = {**raw, **folders}
        return super().model(cls, raw, place, base)

    def _refused(self, cls: type[BaseModel], key: Any, value: Any, place: Place) -> bool:
        """Whether a field that is a path cannot be one; reports why."""
        field = cls.model_fields.get(key)
        is_path = (cls, key) in NAMES_OF_FOLDERS or (field is not None and _holds(field.annotation, Path))
        paths = [each for each in (value if isinstance(value, (list, tuple)) else [value]) if is_path]
        problems = [path_problem(each) for each in paths if isinstance(each, (str, Path))]
        problem = next((each for each in problems if each), None)
        if problem:
            self.mistake((*place, key), f"{problem} (found {shown(value)})")
        return problem is not None

    def _value(self, annotation: Any, raw: Any, place: Place, default: Any) -> Any:
        if _holds(annotation, Path):
            if isinstance(raw, (list, tuple)):
                raw = [absolute(one, self.folder) if isinstance(one, (str, Path)) else one for one in raw]
            elif isinstance(raw, (str, Path)):
                raw = absolute(raw, self.folder)
        return super()._value(annotation, raw, place, default)

    def _text(self, raw: dict[str, Any], place: Place) -> dict[str, Any]:
        bundled, file = raw.get("bundled"), raw.get("file")
        if isinstance(bundled, str) and bundled not in TEXTS:
            self.mistake(
                (*place, "bundled"),
                f"no bundled text is called {bundled!r}{near(bundled, TEXTS)}; there are {', '.join(TEXTS)}",
            )
        if isinstance(file, (str, Path)):
            raw["file"] = absolute(file, self.folder)
            if not (raw["file"].is_file() or is_saved_dataset(raw["file"])):
                folder = f"{raw['file']} is a folder, but not one of datasets' save_to_disk; name a text file"
                self.mistake((*place, "file"), folder if raw["file"].is_dir() else f"there is no file {raw['file']}")
        return raw


def folder_of(name: Any, folder: Path) -> Any:
    """A model's folder below ``folder`` as an absolute path; another name, and one that prunekit knows, as it is."""
    if not isinstance(name, str) or name == BUNDLED or name in MODELS or not (folder / name).is_dir():
        return name
    return str(absolute(name, folder))


def _holds(annotation: Any, wanted: type) -> bool:
    """Whether ``wanted`` is somewhere in an annotation: ``tuple[Path, ...]`` holds ``Path``."""
    return annotation is wanted or any(_holds(part, wanted) for part in get_args(annotation))


def absolute(path: str | Path, folder: Path) -> Path:
    """``path`` from ``folder``, ``~`` expanded."""
    return (folder / Path(path).expanduser()).resolve()


def no_plugin_file(path: str | Path, folder: Path) -> str | None:
    """Why there is no plugin file at a path that starts at ``folder``; None where there is one."""
    if problem := path_problem(path):
        return f"{problem} (found {shown(path)})"
    found = absolute(path, folder)
    if found.is_file():
        return None
    what = "is a folder" if found.is_dir() else "does not exist"
    return f"plugin file {found} {what}; name a Python file, by a path that starts at {folder}"
