"""The base of every plugin class: a frozen record of options with a name and without state."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import Self


class Component(BaseModel):
    """Base of all roles: the fields are the options, ``name`` is its name in pipeline files.

    A concrete component declares its name as a literal with itself as default::

        name: Literal["max_weight"] = "max_weight"

    Instances are immutable and hashable. What changes while a model runs is in the site's
    :class:`~prunekit.registry.ChannelHistory`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    paper: ClassVar[str] = ""
    """The source of the method, shown by ``prunekit show``."""
    exempt: ClassVar[Mapping[str, str]] = {}
    """Checks that do not hold for it, by the function's name, each with the reason; ``prunekit check`` shows them."""

    name: str

    @model_validator(mode="before")
    @classmethod
    def _without_conversions(cls, data: Any) -> Any:
        for key, value in data.items() if isinstance(data, Mapping) else ():
            wrong = wrong_kind(cls.model_fields[key].annotation, value) if key in cls.model_fields else None
            if wrong:
                raise ValueError(f"{key}: {wrong}")
        return data

    @property
    def identity(self) -> tuple[type[Self], str]:
        """Class and options: equal for components that do the same, and always hashable."""
        return type(self), self.model_dump_json(serialize_as_any=True)

    @property
    def identity_text(self) -> str:
        """:attr:`identity` as text, the same in every process: part of the keys under which results are stored."""
        kind, options = self.identity
        return f"{kind.__module__}.{kind.__qualname__} {options}"

    @classmethod
    def summary(cls) -> str:
        """First line of the class's own docstring, shown by ``prunekit list``."""
        doc = cls.__dict__.get("__doc__") or ""
        return inspect.cleandoc(doc).splitlines()[0] if doc.strip() else ""


def wrong_kind(annotation: Any, value: Any) -> str | None:
    """What is wrong with a value that pydantic would convert: text or true for a number, a number for true, 2.0 for 2.

    ``None`` for every other value, right or wrong.
    """
    return _wrong(_parts(annotation), value)


def _wrong(kinds: set[Any], value: Any) -> str | None:
    if isinstance(value, (list, tuple)):
        lists = [kind for kind in kinds if get_origin(kind) in (list, tuple)]
        within: set[Any] = set().union(*(_parts(part) for kind in lists for part in get_args(kind)))
        return next((wrong for item in value if (wrong := _wrong(within - {...}, item))), None)
    number = "a number" if float in kinds else "a whole number"
    if isinstance(value, bool) and kinds & {int, float} and not kinds & {bool, Any, object}:
        return f"should be {number} (found {value!r}); write a number"
    if not kinds <= {bool, int, float, type(None)}:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and kinds & {bool, int, float} == {bool}:
        return f"should be true or false (found {value!r})"
    if isinstance(value, str) and kinds & {bool, int, float}:
        wanted = number if kinds & {int, float} else "true or false"
        percent = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", value) if float in kinds else None
        remedy = f"{float(percent[1]) / 100:g}" if percent else f"{wanted} without quotes"
        return f"should be {wanted}, not text (found {value!r:.100}); write {remedy}"
    if isinstance(value, float) and int in kinds and float not in kinds:
        return f"should be a whole number (found {value!r})"
    return None


def _parts(annotation: Any) -> set[Any]:
    """The alternatives of an annotation; of a literal the types of its values."""
    if get_origin(annotation) is Annotated:
        return _parts(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return set(map(type, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_parts, get_args(annotation)))
    return {annotation}


@functools.cache
def wrong_signature(component: type[Component]) -> str | None:
    """One sentence on the first method whose parameters are not those of its role; None where all fit."""
    role = next((base for base in component.__mro__ if Component in base.__bases__), Component)
    abstract = [base for base in component.__mro__[1:] if inspect.isabstract(base) and issubclass(base, role)]
    for base in dict.fromkeys([role, *abstract]):
        for name, method in vars(base).items():
            if name.startswith("_") or not inspect.isfunction(method):
                continue
            wanted, found = (inspect.signature(f).parameters for f in (method, getattr(component, name)))
            try:
                inspect.signature(getattr(component, name)).bind(*wanted)
            except TypeError:
                return (
                    f"{component.__name__}.{name} takes ({', '.join(found)}); a {base.__name__} must have "
                    f"def {name}({', '.join(wanted)})"
                )
    return None
