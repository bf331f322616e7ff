"""The ``prunekit`` command."""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import __version__

if TYPE_CHECKING:
    from ..registry import Catalog

# Whatever imports torch is imported inside the commands, so that --help and --version answer at once.

app = typer.Typer(
    help="Structured pruning of language models: pluggable strategies, one pipeline, uniform measurements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PluginFiles = Annotated[
    list[Path] | None, typer.Option("--plugin", metavar="FILE", help="A Python file with plugins; may be repeated.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as prune.ratio=0.2; may be repeated."),
]
OutFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the results go.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing results folder.")]
PipelineFile = Annotated[Path, typer.Argument(metavar="FILE", help="A pipeline file (YAML).")]


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as for Ctrl-C, with its own exit code."""


def _terminate(number: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would stop the cleaning up
    raise Terminated


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(130)


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """The user's mistakes become one message and exit code 2; an interruption, one line and 130 (SIGTERM: 143)."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from . import printing

        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            printing.err.print("interrupted; nothing was written", highlight=False)
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
        except Exception as error:
            from ..registry import PrunekitError

            if not isinstance(error, PrunekitError):
                raise
            printing.error(error)
            raise typer.Exit(2) from None

    return run


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"prunekit {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@guarded
def run(
    file: PipelineFile,
    settings: Settings = None,
    out: OutFolder = None,
    plugin: PluginFiles = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a pipeline file and write its results folder.

    Loads the model, calibrates, prunes, and measures the dense and the pruned model.
    """
    from . import printing, report
    from .pipeline import Pipeline

    spec = _read(file, settings, plugin, overwrite)
    printing.quiet()
    with printing.Bars() as bars:
        results = Pipeline(spec).run(out, progress=bars.track)
    printing.say(report.headline(results.data))
    printing.show_table(report.HEAD, report.metric_rows(results.data))
    for note in results.data["notes"]:
        printing.warning(note)
    printing.say(f"results: {results.folder}", whole=True)


@app.command()
@guarded
def demo(out: OutFolder = None, overwrite: Overwrite = False) -> None:
    """Compare all strategies, offline, in a few minutes.

    On the bundled model and text; writes a results folder with a pipeline file for each row.
    """
    from . import demo as demonstration
    from . import printing

    printing.quiet()
    demonstration.run(out, overwrite)


@app.command()
@guarded
def validate(file: PipelineFile, settings: Settings = None, plugin: PluginFiles = None) -> None:
    """Check a pipeline file without loading a model.

    Reports all mistakes at once, each with its place.
    """
    from . import printing

    spec = _read(file, settings, plugin)
    printing.say(f"{file}: valid ({spec.prune.name})", whole=True)


@app.command("list")
@guarded
def list_components(
    role: Annotated[str | None, typer.Argument(metavar="[ROLE]", help="Only this role, such as scorers.")] = None,
    plugin: PluginFiles = None,
) -> None:
    """List the components of every role and who provides them."""
    from . import listing

    listing.show_list(_catalog(plugin), role)


@app.command()
@guarded
def show(name: Annotated[str, typer.Argument(metavar="NAME")], plugin: PluginFiles = None) -> None:
    """Show a component's options, defaults and paper."""
    from . import listing

    listing.show_component(_catalog(plugin), name)


@app.command()
@guarded
def schema(plugin: PluginFiles = None) -> None:
    """Print the JSON Schema of pipeline files, plugins included."""
    import json

    from .schema import pipeline_schema

    typer.echo(json.dumps(pipeline_schema(_catalog(plugin)), indent=2))


def _read(file: Path, settings: list[str] | None, plugins: list[Path] | None, overwrite: bool = False) -> Any:
    from .spec import PipelineSpec

    changes = list(settings or ())
    if overwrite:
        changes.append("output.overwrite=true")
    spec = PipelineSpec.load(file, changes, plugins or ())
    _warn(spec.catalog)
    return spec


def _catalog(plugins: list[Path] | None) -> Catalog:
    from ..registry import Catalog

    catalog = Catalog.discover(plugins or ())
    _warn(catalog)
    return catalog


def _warn(catalog: Catalog) -> None:
    from . import printing

    for problem in catalog.problems:
        printing.warning(problem)
    for blocked in catalog.blocked:
        printing.warning(f"plugin {blocked} is switched off by PRUNEKIT_BLOCK")
