"""The command that runs the checks of components."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Commands, PluginFiles

if TYPE_CHECKING:
    from ...registry import Architecture, Catalog, Entry, Evaluator
    from ...registry.checks import Finding
    from ..models.loading import Loaded

# The commands import torch and what needs it when they run, so that --help and --version answer at once.


def check(
    name: Annotated[
        str, typer.Argument(metavar="NAME_OR_FILE", help="A component, an installed plugin, or a plugin file.")
    ],
    plugin: PluginFiles = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="MODEL", help="A small model (hub id or folder) for architectures and evaluators."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """Check that components keep the rules of their role.

    Runs every check of a component, or of all components of a plugin. Exit code 1 if one fails.
    """
    import json

    from ...registry import Catalog
    from ..models.loading import load
    from ..models.source import ModelSource
    from ..output import printing

    printing.quiet()
    file = Path(name) if name.endswith(".py") or Path(name).is_file() else None
    catalog = Catalog.discover([*([] if file is None else [file]), *(plugin or ())])
    printing.catalog_problems(catalog)
    loaded = None if model is None else load(ModelSource(name=model))
    found = [(entry, finding) for entry in entries_of(catalog, name, file) for finding in all_findings(entry, loaded)]
    failed = [finding for _, finding in found if finding.result == "failed"]
    if as_json:
        about = ({"component": entry.name, "role": entry.role, **finding._asdict()} for entry, finding in found)
        typer.echo(json.dumps(list(about), indent=2))
    else:
        # What failed is next to the last line, where people look.
        shown = sorted(found, key=lambda each: each[1].result == "failed")
        rows = [(entry.name, each.check, each.result, each.message or each.rule) for entry, each in shown]
        printing.show_table(("component", "check", "", ""), rows, left=4)
        left_out = sum(finding.result == "left out" for _, finding in found)
        printing.say(f"{len(found)} checks: {len(failed)} failed, {left_out} left out")
    if failed:
        raise typer.Exit(1)


def entries_of(catalog: Catalog, name: str, file: Path | None) -> list[Entry]:
    """The components of a plugin file, of this name, or of the installed plugin of this name.

    Raises :class:`SpecError` for none.
    """
    from ...registry import SpecError, near

    if file is not None:
        return [entry for entry in catalog.entries if entry.provider == f"file {file}"]
    found = [entry for entry in catalog.entries if entry.name == name]
    found = found or [entry for entry in catalog.entries if entry.plugin == name]
    if not found:
        known = {known for entry in catalog.entries for known in (entry.name, entry.plugin)}
        raise SpecError(f"no component, plugin or plugin file is called {name!r}{near(name, known)}")
    return found


def all_findings(entry: Entry, loaded: Loaded | None) -> Iterator[Finding]:
    """What all checks say of a component with its default options, those that need a model too."""
    from ...registry import Architecture, Evaluator
    from ...registry.checks import Finding, built, findings

    try:
        component = built(entry.component)
    except AssertionError as error:
        yield Finding("built", "It can be made by its name alone.", "left out", str(error))
        return
    yield from findings(component)
    if isinstance(component, Architecture):
        yield from _on_models(component, loaded)
    elif isinstance(component, Evaluator):
        yield _measured(component, loaded)


def _on_models(architecture: Architecture, loaded: Loaded | None) -> Iterator[Finding]:
    """``check_architecture`` on the model, or on a small one of every type that the architecture serves."""
    from transformers import CONFIG_MAPPING

    from ...registry.checks import Finding
    from ..models.architectures import PRUNED
    from ..models.small import small_model
    from ..pruning.checking import check_architecture

    name, rule = "check_architecture", "What is cut equals what is zeroed, padded or not, in generation too"
    if loaded is not None:
        yield _run(name, rule, lambda: check_architecture(architecture, loaded.model))
        return
    for kind in (kind for kind in architecture.model_types if not kind.startswith(PRUNED)):
        try:
            model = small_model(kind) if kind in CONFIG_MAPPING else None
        except Exception as error:  # the recipe does not fit every type
            model, why = None, f"{type(error).__name__}: {error!s:.200}"
        else:
            why = "the installed transformers has no such type"
        if model is None:
            yield Finding(name, rule, "left out", f"no small {kind} can be made ({why}); give one by --model")
        else:
            yield _run(name, f"{rule} ({kind})", partial(check_architecture, architecture, model))


def _measured(evaluator: Evaluator, loaded: Loaded | None) -> Finding:
    """``check_evaluation`` on the model, or on the bundled one."""
    from ...registry.checks import check_evaluation
    from ..models.loading import load
    from ..models.source import ModelSource
    from ..runs.measuring import Unpruned

    subject, rule = Unpruned(loaded or load(ModelSource())), "It measures numbers, and leaves everything as it was"
    return _run("check_evaluation", rule, lambda: check_evaluation(evaluator, subject))


def _run(name: str, rule: str, check: Callable[[], None]) -> Finding:
    """What a check on a model says; it is left out where the component refuses the model."""
    from ...registry import PrunekitError
    from ...registry.checks import Finding

    try:
        check()
    except AssertionError as error:
        return Finding(name, rule, "failed", str(error))
    except PrunekitError as error:
        return Finding(name, rule, "left out", str(error))
    return Finding(name, rule, "passed", "")


COMMANDS: Commands = {"check": check}
