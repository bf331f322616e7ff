"""Finds every plugin, built in, installed or in a file, and returns components by name."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, distributions
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pluggy
from pydantic.errors import PydanticUserError

from .component import Component, wrong_signature
from .errors import PluginError
from .roles.hookspecs import PLUGIN_API, PROJECT, ROLES, Hooks

BLOCK_VARIABLE = "PRUNEKIT_BLOCK"
FILE_PREFIX = "prunekit_plugin_"
"""Begins the module name of a plugin file."""

PARTS = {
    "scorer": "Scorer = WandaSpScorer(), from prunekit.strategies",
    "allocator": "SparsityAllocator = Uniform(), from prunekit.strategies",
    "applier": "MaskApplier = Slice(), from prunekit.strategies",
}
"""Parts that every strategy has, with an example."""


@dataclass(frozen=True)
class Entry:
    """One component and who provides it."""

    role: str
    name: str
    component: type[Component]
    plugin: str
    provider: str

    @property
    def import_line(self) -> str | None:
        """The line that imports the class, from the shortest module path; None for the class of a plugin file."""
        name, parts = self.component.__name__, self.component.__module__.split(".")
        if parts[0].startswith(FILE_PREFIX):
            return None
        modules = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
        found = [path for path in modules if vars(sys.modules[path]).get(name) is self.component]
        return f"from {found[0]} import {name}" if found else None


@dataclass
class Catalog:
    """All components by role and name, and the problems found while collecting them."""

    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)

    @classmethod
    def discover(cls, files: Iterable[str | Path] = (), block: str | None = None) -> Catalog:
        """Collect the plugins of entry-point group ``prunekit`` and of the Python ``files`` named by the user.

        ``block`` (default: the variable ``PRUNEKIT_BLOCK``) lists plugins or distributions to leave out,
        separated by commas. A broken installed plugin becomes a line of ``problems``, and the others keep
        working. A broken file raises :class:`PluginError`.
        """
        catalog = cls()
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(Hooks)
        points = _entry_points()
        blocked = {_normal(part.strip()) for part in _block_list(block).split(",") if part.strip()}
        known = {_normal(name) for point, distribution, _ in points for name in (point.name, distribution)}
        for name in sorted(blocked - known):
            catalog.problems.append(
                f"{BLOCK_VARIABLE} names {name!r}, which is neither a plugin nor a distribution{near(name, known)}"
            )
        for point, distribution, version in points:
            provider = f"{distribution} {version}".rstrip()
            if blocked & {_normal(point.name), _normal(distribution)}:
                catalog.blocked.append(f"{point.name} ({provider})")
                continue
            try:
                plugin = point.load()
            except (Exception, SystemExit) as error:  # nothing that a third-party module raises may stop the others
                catalog.problems.append(
                    f"plugin {point.name} of {provider} cannot be imported: {type(error).__name__}: {error}"
                )
                continue
            catalog._take(manager, plugin, point.name, provider)
        for path in dict.fromkeys(map(Path, files)):
            before = len(catalog.problems)
            catalog._take(manager, load_plugin_file(path), path.stem, f"file {path}")
            if len(catalog.problems) > before:
                raise PluginError("\n".join(catalog.problems[before:]))
        for role in ROLES:
            for name in catalog.names(role):
                providers = [e for e in catalog.entries if (e.role, e.name) == (role, name)]
                if len(providers) > 1:
                    catalog.problems.append(_conflict(providers))
        return catalog

    def _take(self, manager: pluggy.PluginManager, plugin: Any, name: str, provider: str) -> None:
        """Register one plugin and collect what its hooks return."""
        where = f"plugin {name} of {provider}"
        stated = getattr(plugin, "PLUGIN_API", PLUGIN_API)
        if stated != PLUGIN_API:
            self.problems.append(
                f"{where} is written for plugin API {stated!r}, and this prunekit has {PLUGIN_API}; install another "
                "version of one of the two"
            )
            return
        if manager.is_registered(plugin):
            self.problems.append(f"{where} is a module that another plugin has already brought; name it once")
            return
        try:
            registered = manager.register(plugin, name=f"{provider}:{name}")
            callers = manager.get_hookcallers(plugin) or []
        except (pluggy.PluginValidationError, ValueError) as error:
            self.problems.append(f"{where} is not usable: {' '.join(str(error).split())}")
            return
        found, named = False, {caller.name for caller in callers}
        for caller in callers:
            if caller.name not in ROLES:
                self.problems.append(f"{where}: there is no hook {caller.name!r}{near(caller.name, ROLES)}")
                continue
            found = True
            for implementation in caller.get_hookimpls():
                if implementation.plugin_name == registered:
                    self._collect(caller.name, implementation.function, name, provider)
        if not found and not any(where in problem for problem in self.problems):
            self.problems.append(f"{where} implements no hook (decorate a function with prunekit.registry.hookimpl)")
        for role in ROLES if found else ():
            bare = getattr(plugin, role, None)
            if role not in named and inspect.isfunction(bare) and bare.__module__ == getattr(plugin, "__name__", None):
                self.problems.append(
                    f"{where}: its function {role} is not a hook; write @hookimpl on the line above it"
                )

    def _collect(self, role: str, hook: Any, plugin: str, provider: str) -> None:
        where = f"hook {role} of plugin {plugin} ({provider})"
        try:
            components = hook()
        except (Exception, SystemExit) as error:  # third-party code again
            self.problems.append(f"{where} raised {type(error).__name__}: {error}")
            return
        if not isinstance(components, (list, tuple)):
            self.problems.append(f"{where} must return a list of classes, found {components!r}")
            return
        for component in components:
            wrong = complaint(component, ROLES[role]) or (missing_parts(component) if role == "strategies" else None)
            if wrong:
                self.problems.append(f"{where}: {wrong}")
            else:
                name = component.model_fields["name"].default
                self.entries.append(Entry(role, name, component, plugin, provider))

    def names(self, role: str) -> list[str]:
        """Names of a role's components, sorted."""
        return sorted({entry.name for entry in self.entries if entry.role == role})

    def of_role(self, role: str) -> list[Entry]:
        """A role's components, one entry for each name; names provided twice are left out."""
        mine = [entry for entry in self.entries if entry.role == role]
        counts = {name: sum(e.name == name for e in mine) for name in {e.name for e in mine}}
        return sorted((e for e in mine if counts[e.name] == 1), key=lambda e: e.name)

    def get(self, role: str, name: str) -> type[Component]:
        """The component class called ``name``; raises :class:`PluginError` for none or several."""
        found = [entry for entry in self.entries if (entry.role, entry.name) == (role, name)]
        if len(found) == 1:
            return found[0].component
        if found:
            raise PluginError(_conflict(found))
        message = f"no {ROLES[role].__name__} is called {name!r}{near(name, self.names(role))}"
        others = sorted({singular(entry.role).replace("_", " ") for entry in self.entries if entry.name == name})
        if others:
            message += f"; {name!r} is the name of another part: {', '.join(others)}"
        message += f"; there are {', '.join(self.names(role)) or 'none'}"
        for note in [*self.problems, *(f"{BLOCK_VARIABLE} switches off plugin {plugin}" for plugin in self.blocked)]:
            message += f"\nnote: {note}"
        raise PluginError(message)


def named(component: Component) -> str:
    """Role, name and plugin of a component in a few words: ``scorer 'mine' of plugin file mine.py``."""
    role = next((role for role, base in ROLES.items() if isinstance(component, base)), "components")
    module = type(component).__module__.partition(".")[0]
    plugin = f"file {module.removeprefix(FILE_PREFIX)}.py" if module.startswith(FILE_PREFIX) else module
    return f"{singular(role).replace('_', ' ')} {component.name!r} of plugin {plugin}"


def singular(role: str) -> str:
    """The name of a hook for one component: ``scorer``, ``strategy``, ``probe_selector``."""
    return f"{role[:-3]}y" if role.endswith("ies") else role[:-1]


def is_foreign(component: Component) -> bool:
    """Whether a component comes from somebody else than prunekit."""
    return type(component).__module__.partition(".")[0] != PROJECT


def load_plugin_file(path: Path) -> ModuleType:
    """Import a plain Python file as a plugin; raises :class:`PluginError` naming file and error."""
    if not path.is_file():
        raise PluginError(
            f"plugin file {path} does not exist; paths of --plugin start here, those of a YAML file at its folder"
        )
    spec = importlib.util.spec_from_file_location(FILE_PREFIX + path.stem, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise PluginError(f"plugin file {path} cannot be imported: {_import_error(error, path)}") from error
    return module


def _import_error(error: BaseException, path: Path) -> str:
    """What an import raised, with the last line of the file that it came from, and a remedy for a bare ``name``."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path.absolute()
    ]
    place = f"line {lines[-1]}: " if lines else ""
    if isinstance(error, PydanticUserError):
        bare = error.code == "model-field-overridden" and "'name'" in error.message
        remedy = ' Write name: Literal["mine"] = "mine".' if bare else ""
        return f"{place}{type(error).__name__}: {error.message}{remedy}"
    return f"{place}{type(error).__name__}: {error}"


def near(name: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` where a known name is close, else nothing."""
    matches = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _normal(name: str) -> str:
    """A name in the form in which packaging compares names: ``Max_Weight`` and ``max-weight`` are equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _block_list(block: str | None) -> str:
    return os.environ.get(BLOCK_VARIABLE, "") if block is None else block


def _name_and_version(dist: Distribution) -> tuple[str, str]:
    """What a distribution's metadata states; parses the file, which a damaged installation may have lost."""
    metadata = dist.metadata
    name, version = (metadata[key] if metadata is not None and key in metadata else "" for key in ("Name", "Version"))
    return name or "unknown distribution", version


def _entry_points() -> list[tuple[EntryPoint, str, str]]:
    """Entry points of the group, each with name and version of its distribution; what two paths show is listed once."""
    found: dict[tuple[str, str, str], tuple[EntryPoint, str, str]] = {}
    for dist in distributions():
        points = [point for point in dist.entry_points if point.group == PROJECT]
        name, version = _name_and_version(dist) if points else ("", "")
        for point in points:
            found.setdefault((name, point.name, point.value), (point, name, version))
    return [found[key] for key in sorted(found)]


def complaint(component: Any, role: type[Component]) -> str | None:
    """What is wrong with a class that a hook returned; None if nothing is."""
    if not (inspect.isclass(component) and issubclass(component, role)):
        return f"expected a class derived from {role.__name__}, found {component!r}"
    if inspect.isabstract(component):
        missing = ", ".join(sorted(component.__abstractmethods__))
        return f"{component.__name__} does not implement {missing}"
    name = component.model_fields["name"]
    if get_origin(name.annotation) is not Literal or get_args(name.annotation) != (name.default,):
        return f'{component.__name__} must declare its name: name: Literal["..."] = "..."'
    signature = wrong_signature(component)
    if signature:
        return signature
    for option, declared in component.model_fields.items():
        if _unhashable(declared.annotation):
            return (
                f"{component.__name__} has an option that cannot be hashed, {option}: {declared.annotation}; "
                "use tuple[...] instead of lists, sets and dicts"
            )
    return None


def missing_parts(strategy: type[Component]) -> str | None:
    """What a strategy class must add to be used by its name; None where nothing is missing."""
    missing = [part for part in PARTS if strategy.model_fields[part].is_required()]
    added = "; ".join(f"{part}: {PARTS[part]}" for part in missing)
    return (
        f"{strategy.__name__} has no {', '.join(missing)}; add to the class, for example, {added}" if missing else None
    )


def _unhashable(annotation: Any) -> bool:
    """Whether values of this type may be or contain lists, sets or dicts."""
    kind = get_origin(annotation) or annotation
    if inspect.isclass(kind) and issubclass(kind, (list, set, dict)):
        return True
    return kind is not Literal and any(_unhashable(part) for part in get_args(annotation))


def _conflict(entries: list[Entry]) -> str:
    who = " and ".join(f"plugin {e.plugin} of {e.provider}" for e in entries)
    return (
        f"{ROLES[entries[0].role].__name__} {entries[0].name!r} is provided twice, by {who}; "
        f"switch one off with {BLOCK_VARIABLE}=PLUGIN (or its distribution's name)"
    )
