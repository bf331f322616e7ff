"""Turns names and options, from a pipeline file or from Python, into components; reports every mistake at once."""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ...registry import (
    ROLES,
    Catalog,
    Compensator,
    Component,
    Evaluator,
    HistoryStorage,
    PluginError,
    SparsityAllocator,
    SpecError,
    Strategy,
    near,
)
from ...registry.catalog import singular
from ...registry.component import wrong_kind
from ..engine.runtime import Runtime
from ..models.likeness import Like
from ..output.reading import LARGEST, shown
from . import moved

Model = TypeVar("Model", bound=BaseModel)
Built = TypeVar("Built")
Place = tuple[str | int, ...]

NO_CHARACTER = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which no text can hold."""


@dataclass(frozen=True)
class Mistake:
    """Where something is wrong (keys and list places from the top) and what, with the remedy."""

    place: Place
    message: str

    def __str__(self) -> str:
        where = ".".join(str(part) for part in self.place)
        return f"{where}: {self.message}" if where else self.message


class Mistakes(SpecError):
    """All mistakes of one piece of data, one by one in ``found``."""

    def __init__(self, message: str, found: Iterable[Mistake]):
        super().__init__(message)
        self.found = tuple(found)


def build_strategy(catalog: Catalog, strategy: str | Strategy | type[Strategy], options: Mapping[str, Any]) -> Strategy:
    """The strategy called ``strategy`` (or that object) with ``options`` in place of its own settings.

    A component is given as an object, by its name, or as a mapping of ``name`` and options; without a
    name, or with the name of the component the strategy already uses, the mapping changes only the
    options it lists. ``None`` removes the selector, merger and compensation. Raises :class:`SpecError` naming every
    mistake at once.
    """
    for key in ("use", "name"):
        if key in options:
            raise SpecError(
                f"{key}: is not an option (found {shown(options[key])}); the strategy is an argument of its own"
            )
    if "plugins" in options:
        raise SpecError(
            f"plugins: is a key of pipeline files (found {shown(options['plugins'])}); in Python pass "
            'catalog=Catalog.discover(["my_plugin.py"]), with Catalog from prunekit.registry'
        )
    reader = Reader(catalog)
    built: Component | None
    if isinstance(strategy, str):
        label = f"strategy {strategy}"
        built = reader.component("strategies", {"use": strategy, **options}, ())
    else:
        if isinstance(strategy, type) and issubclass(strategy, Strategy):
            strategy = of_defaults(strategy, f"strategy {strategy.__name__}", "pass an object with its options")
        if not isinstance(strategy, Strategy):
            raise SpecError(f"expected the name of a strategy or a Strategy object, found {shown(strategy)}")
        label = f"strategy {strategy.name}"
        built = reader.model(type(strategy), options, (), base=strategy) if options else reader.complete(strategy, ())
    found = reader.result(built, label)
    if not isinstance(found, Strategy):
        raise SpecError(f"{label}: is not a strategy")
    return found


def build_runtime(runtime: Runtime | Mapping[str, Any] | None) -> Runtime:
    """A :class:`Runtime` from options; raises :class:`SpecError` naming every mistake at once."""
    reader = Reader(Catalog())
    return reader.result(reader.model(Runtime, {} if runtime is None else runtime, ("runtime",)), "runtime")


def build_architecture(architecture: Like | Mapping[str, Any]) -> Like:
    """A :class:`Like` from options; raises :class:`SpecError` naming every mistake at once."""
    reader = Reader(Catalog())
    return reader.result(reader.model(Like, architecture, ("architecture",)), "architecture")


class Reader:
    """Reads plain data (dicts, lists, numbers, names) into pydantic models and collects the mistakes."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self.mistakes: list[Mistake] = []
        self._notes: list[str] = []

    def result(self, built: Built | None, label: str, at: Callable[[Place], str] = lambda place: "") -> Built:
        """``built``, or one :class:`SpecError` with all mistakes; ``at`` gives the line of a place in a file."""
        if built is not None and not self.mistakes:
            return built
        lines = [f"{at(mistake.place)}{mistake}" for mistake in self.mistakes]
        several = [f"{label}: {len(lines)} mistakes", *(f"  {line}" for line in lines)]
        message = [f"{label}: {lines[0]}"] if len(lines) == 1 else several
        raise Mistakes("\n".join([*message, *self._notes]), self.mistakes)

    def mistake(self, place: Place, message: str) -> None:
        self.mistakes.append(Mistake(place, message))

    def model(self, cls: type[Model], raw: Any, place: Place, base: BaseModel | None = None) -> Model | None:
        """An instance of ``cls`` from a mapping; fields that it leaves out are those of ``base``."""
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, Mapping):
            required = any(field.is_required() for field in cls.model_fields.values())
            defaults = "" if required else "; {} takes all defaults"
            self.mistake(place, f"expected a mapping of {', '.join(visible(cls))} (found {shown(raw)}){defaults}")
            return None
        start = len(self.mistakes)
        values = {} if base is None else {key: getattr(base, key) for key in base.model_fields_set}
        for key, value in raw.items():
            here = (*place, key)
            if key not in visible(cls):
                default, remedy = moved.OPTIONS.get((role_of(cls) or "", key), (None, ""))
                if remedy and value == default:
                    continue
                if remedy:
                    self.mistake(here, f"is no longer an option here (found {shown(value)}); {remedy}")
                    continue
                self.mistake(here, f"unknown key{self._instead(cls, key, base)}")
                continue
            default = default_of(cls, key) if base is None else getattr(base, key)
            annotation = cls.model_fields[key].annotation
            flaw = wrong_kind(annotation, value) or (flaw_of(value) if kind_of(annotation)[0] is None else None)
            if flaw:
                self.mistake(here, flaw)
            values[key] = value if flaw else self._value(annotation, value, here, default)
        if issubclass(cls, Strategy):
            allocator, ratio = (values.get(key, default_of(cls, key)) for key in ("allocator", "ratio"))
            self._check_ratio(allocator, ratio, place)
        flawed = {mistake.place[len(place)] for mistake in self.mistakes[start:] if len(mistake.place) > len(place)}
        kept = {key: value for key, value in values.items() if key not in flawed}
        try:
            built = cls.model_validate(kept)
        except ValidationError as error:
            for problem in error.errors():
                loc = problem["loc"]
                # What a whole model says about itself means nothing while one of its parts is missing.
                if (loc and loc[0] in flawed) or (not loc and flawed):
                    continue
                about = cls.model_fields[loc[0]].description if len(loc) == 1 and loc[0] in cls.model_fields else None
                self.mistake((*place, *loc), describe(problem, about))
            return None
        return _seeded(built) if len(self.mistakes) == start else None

    def component(self, role: str, raw: Any, place: Place, default: Component | None = None) -> Component | None:
        """A role's component from an object, a name, or a mapping of its name and options."""
        title, tag = ROLES[role].__name__, "use" if role == "strategies" else "name"
        if isinstance(raw, ROLES[role]):
            return seed_parts(raw) if isinstance(raw, Strategy) else raw
        options = {tag: raw} if isinstance(raw, str) else raw
        if not isinstance(options, Mapping):
            self.mistake(place, f"expected a {title}, by name or as {{{tag}: NAME, options}} (found {shown(raw)})")
            return None
        options = dict(options)
        name = options.pop(tag, None if default is None else default.name)
        at_name = place if isinstance(raw, str) else (*place, tag)
        if not isinstance(name, str):
            known = ", ".join(self.catalog.names(role))
            found = "" if name is None else f" (found {shown(name)})"
            none = name is None and options and role in ("probe_selectors", "history_mergers")
            before = f"this strategy has no {place[-1]} whose options could be set: leave it out, or " if none else ""
            self.mistake(place if none else at_name, f"{before}name the {title}{found}; there are {known}")
            return None
        if default is not None and name == default.name:
            return self.model(type(default), options, place, base=default)
        try:
            cls = self.catalog.get(role, name)
        except PluginError as error:
            message, *notes = str(error).split("\n")
            if (role, name) in moved.NAMES:
                message, notes = f"{title} {shown(name)} has another name now; write {moved.NAMES[role, name]}", []
            self.mistake(at_name, message)
            self._notes = notes
            likely = get_close_matches(name, [entry.name for entry in self.catalog.of_role(role)], n=1)
            if likely:  # look at its options as if it had been written correctly
                self.model(self.catalog.get(role, likely[0]), options, place)
            return None
        return self.model(cls, options, place)

    def _value(self, annotation: Any, raw: Any, place: Place, default: Any) -> Any:
        """``raw`` with components and nested models built, as the field's annotation asks for them."""
        cls, optional, many = kind_of(annotation)
        if cls is None or (raw is None and (optional or issubclass(cls, Compensator))):
            return raw  # a strategy reads no compensator as the component none
        if many:
            if not isinstance(raw, (list, tuple)):
                self.mistake(place, f"expected a list (found {shown(raw)})")
                return None
            return [self._one(cls, item, (*place, index), None) for index, item in enumerate(raw)]
        return self._one(cls, raw, place, default)

    def _one(self, cls: type[BaseModel], raw: Any, place: Place, default: Any) -> Any:
        role = role_of(cls)
        if role is None:  # a text source is given whole: its keys exclude each other
            return self.model(cls, raw, place, base=default if isinstance(default, HistoryStorage) else None)
        return self.component(role, raw, place, default if isinstance(default, Component) else None)

    def complete(self, strategy: Strategy, place: Place) -> Strategy:
        """A strategy that was built in Python, as :meth:`model` builds one."""
        self._check_ratio(strategy.allocator, strategy.ratio, place)
        return seed_parts(strategy)

    def _check_ratio(self, allocator: Any, ratio: Any, place: Place) -> None:
        """Whether a ratio is needed depends on the allocator; pydantic checks its range."""
        if not isinstance(allocator, SparsityAllocator):
            return
        if allocator.takes_ratio and ratio is None:
            self.mistake((*place, "ratio"), "is required: the share of the model's units to cut, 0 <= ratio < 1")
        elif not allocator.takes_ratio and ratio is not None:
            self.mistake(
                (*place, "ratio"), f"allocator {allocator.name} takes no ratio (found {shown(ratio)}); leave it out"
            )

    def _instead(self, cls: type[BaseModel], key: Any, base: BaseModel | None) -> str:
        """Where ``key`` belongs, in use or in another component; else the key that is near, or the keys there are."""
        for field in cls.model_fields:
            part = default_of(cls, field) if base is None else getattr(base, field)
            if isinstance(part, Component) and key in visible(type(part)):
                return f"; it is an option of {field} {part.name}: write {field}: {{{key}: ...}}"
        roles = {field: role_in(info.annotation) for field, info in cls.model_fields.items()}
        found = {field: self._owner(role, key) for field, role in roles.items() if role}
        owners = [f"of {name}: write {field}: {{name: {name}, {key}: ...}}" for field, name in found.items() if name]
        if owners and issubclass(cls, Strategy):
            return f"; it is an option {', or '.join(owners[:2])}"
        role = role_of(cls)
        if visible(cls) or role is None:
            return near(key, visible(cls)) or f"; there are {', '.join(visible(cls)) or 'none'}"
        owner = self._owner(role, key)
        such = f", such as {{name: {owner}, {key}: ...}}" if owner else f" (prunekit list {role})"
        name = cls.model_fields["name"].default
        return f"; {ROLES[role].__name__} {name} has no options, so name the one that is meant{such}"

    def _owner(self, role: str, key: Any) -> str | None:
        """The first of a role's components that has the option ``key``."""
        return next((entry.name for entry in self.catalog.of_role(role) if key in visible(entry.component)), None)


def _seeded(built: Model) -> Model:
    return built.model_copy(update=_seeded_parts(built)) if isinstance(built, Strategy) else built


def seed_parts(strategy: Strategy) -> Strategy:
    """``strategy`` with its seed passed to its components that draw and name none; see :func:`with_seed`."""
    return strategy.model_copy(update=_seeded_parts(strategy))


def _seeded_parts(strategy: Strategy) -> dict[str, Component]:
    parts = {field: getattr(strategy, field) for field in type(strategy).model_fields}
    seeded = {key: with_seed(part, strategy.seed) for key, part in parts.items() if isinstance(part, Component)}
    changed = {key: part for key, part in seeded.items() if part is not parts[key]}
    for part in changed.values():
        part.model_fields_set.discard("seed")  # so that another seed of the strategy reaches it again
    return changed


def with_seed(part: Model, seed: int) -> Model:
    """``part`` with this seed, if it has a seed and names none of its own; with 0, the default, it has its own default.

    So a written default gives the same as one that is left out, also where a part's default is another number.
    """
    if "seed" not in type(part).model_fields or "seed" in part.model_fields_set:
        return part
    wanted = seed or default_of(type(part), "seed")
    return part if getattr(part, "seed", None) == wanted else part.model_copy(update={"seed": wanted})


def with_rows(evaluator: Evaluator, longest: int) -> Evaluator:
    """``evaluator`` with rows of at most ``longest`` tokens, if its row option was left out."""
    option = evaluator.row_option
    if option is None or option in evaluator.model_fields_set or (getattr(evaluator, option) or 0) <= longest:
        return evaluator
    lowered = evaluator.model_copy(update={option: longest})
    lowered.model_fields_set.discard(option)  # so that a study can lower it again
    return lowered


def flaw_of(value: Any) -> str | None:
    """Why a value can be no option, whichever: text that no file can hold, or too large an integer."""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return next((flaw for item in value if (flaw := flaw_of(item))), None)
    if isinstance(value, str) and ("\0" in value or (not value.isprintable() and NO_CHARACTER.search(value))):
        return f"has a NUL byte or half of a surrogate pair (found {shown(value)}); leave it out"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"is larger than a number may be (found {shown(value)}); write at most {LARGEST:,}"
    return None


def visible(cls: type[BaseModel]) -> list[str]:
    """The options of a model that a user can set: a component's name says which it is."""
    return [key for key in cls.model_fields if not (key == "name" and issubclass(cls, Component))]


def default_of(cls: type[BaseModel], field: str) -> Any:
    """A field's default, or ``None`` where it has none."""
    info = cls.model_fields.get(field)
    return None if info is None or info.is_required() else info.get_default(call_default_factory=True)


def role_of(cls: type) -> str | None:
    """The role whose component ``cls`` is."""
    return next((role for role, base in ROLES.items() if issubclass(cls, base)), None)


def role_in(annotation: Any) -> str | None:
    """The role that an annotation asks a component of, if it does."""
    cls = kind_of(annotation)[0]
    return None if cls is None else role_of(cls)


def kind_of(annotation: Any) -> tuple[type[BaseModel] | None, bool, bool]:
    """The model in an annotation (or None), whether ``None`` is allowed, and whether it is a list of them."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin in (Union, types.UnionType):
        found = [kind_of(part) for part in arguments if part is not type(None)]
        models = [kind for kind in found if kind[0] is not None]
        cls, _, many = models[0] if models else (None, False, False)
        return cls, type(None) in arguments, many
    if origin in (list, tuple) and arguments:
        return kind_of(arguments[0])[0], False, True
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return (annotation if is_model else None), False, False


def by_name(catalog: Catalog, role: str, name: str, remedy: str) -> Component:
    """A role's component with its default options.

    Raises :class:`SpecError`, which ends with the remedy, for one that has options without a default.
    """
    component = catalog.get(role, name)
    provider = next(entry.provider for entry in catalog.of_role(role) if entry.name == name)
    return of_defaults(component, f"{singular(role).replace('_', ' ')} {name!r} of {provider}", remedy)


def of_defaults(component: type[Model], who: str, remedy: str) -> Model:
    """An object of a class with default options; raises :class:`SpecError` where they are refused."""
    try:
        return component.model_validate({})
    except ValidationError as error:
        found = [(".".join(map(str, problem["loc"])), problem) for problem in error.errors()]
        abouts = {name: info.description for name, info in component.model_fields.items()}
        said = "; ".join(f"{f'option {key} ' if key else ''}{describe(each, abouts.get(key))}" for key, each in found)
        raise SpecError(f"{who}: {said}; {remedy}") from None


def describe(problem: Mapping[str, Any], about: str | None = None) -> str:
    """One of pydantic's errors in a sentence that names the value found, or what is missing."""
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] == "missing":
        return f"is required: {about}" if about else "is required"
    if problem["type"] == "value_error":
        return message
    message = message.replace("Input should", "should").replace("tuple", "list").replace("Tuple", "List")
    found = problem["input"]
    if problem["type"] == "string_type" and isinstance(found, (int, float)):
        return f"{message} (found {shown(found)}); put quotes around text"
    if problem["type"] == "literal_error" and isinstance(found, str):
        choices = [part.strip("'") for part in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"{message} (found {shown(found)}){near(found, choices)}"
    return f"{message} (found {shown(found)})"
