"""The base of every plugin class: a frozen record of options with a name and without state."""

from __future__ import annotations

import functools
import inspect
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
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

    name: str

    @property
    def identity(self) -> tuple[type[Self], str]:
        """Class and options: equal for components that do the same, and always hashable."""
        return type(self), self.model_dump_json(serialize_as_any=True)

    @classmethod
    def summary(cls) -> str:
        """First line of the class's own docstring, shown by ``prunekit list``."""
        doc = cls.__dict__.get("__doc__") or ""
        return inspect.cleandoc(doc).splitlines()[0] if doc.strip() else ""


@functools.cache
def wrong_signature(component: type[Component]) -> str | None:
    """One sentence on the first method whose parameters are not those of its role; None where all fit."""
    role = next((base for base in component.__mro__ if Component in base.__bases__), Component)
    for name, method in vars(role).items():
        if name.startswith("_") or not inspect.isfunction(method):
            continue
        wanted, found = (inspect.signature(f).parameters for f in (method, getattr(component, name)))
        try:
            inspect.signature(getattr(component, name)).bind(*wanted)
        except TypeError:
            return (
                f"{component.__name__}.{name} takes ({', '.join(found)}); a {role.__name__} must have "
                f"def {name}({', '.join(wanted)})"
            )
    return None
