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
            printing.err.print(str(stop) or "interrupted; nothing was written", highlight=False, soft_wrap=True)
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
    from ..registry import SpecError
    from . import printing
    from . import report as tables
    from .ablation.study_file import is_study
    from .pipeline import Pipeline

    if is_study(file):
        raise SpecError(f"{file} is an ablation file; use prunekit ablate {file}")
    spec = _read(file, settings, plugin, overwrite)
    printing.quiet()
    with printing.Bars() as bars:
        results = Pipeline(spec).run(out, progress=bars.track)
    printing.say(tables.headline(results.data))
    printing.show_table(tables.HEAD, tables.metric_rows(results.data))
    for note in results.data["notes"]:
        printing.warning(note)
    printing.say(f"results: {results.folder}", whole=True)


@app.command()
@guarded
def ablate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ablation file (YAML).")],
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="STORE", help="The results store; results/FILE.sqlite by default.")
    ] = None,
    plugin: PluginFiles = None,
    engine: Annotated[str, typer.Option("--engine", metavar="local|ray", help="What runs the trials.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers of the ray engine.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster that runs already, such as auto.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Go on with a store whose file has changed.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
) -> None:
    """Run an ablation study: a pipeline with some of its fields varied.

    Every finished trial is stored at once; the same command goes on where it was stopped.
    """
    from . import printing
    from .ablation import command

    printing.quiet()
    command.ablate(file, settings or (), plugin or (), out, engine, workers, address, update, retry)


@app.command()
@guarded
def report(
    source: Annotated[Path, typer.Argument(metavar="STORE_OR_FOLDER", help="An ablation's store or a results folder.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
) -> None:
    """Write a report of a study or a run: HTML, tables and plots."""
    from . import printing
    from .reporting import command

    printing.quiet()
    command.report(source, out, overwrite)


@app.command()
@guarded
def pivot(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE", help="Ablations' stores; several are axis store.")],
    rows: Annotated[str, typer.Option("--rows", metavar="AXIS", help="The axis whose values are rows.")],
    columns: Annotated[str, typer.Option("--columns", metavar="AXIS", help="The axis whose values are columns.")],
    by: Annotated[str | None, typer.Option(metavar="AXIS", help="A table for each value, and one over all.")] = None,
    metric: Annotated[str | None, typer.Option(metavar="LABEL.VALUE", help="Such as prr.prr; else quality.")] = None,
    relative: Annotated[str, typer.Option(metavar="AXIS=VALUE,...|dense", help="Compare with these.")] = "dense",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write tables and heat maps there too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing cross tables.")] = False,
) -> None:
    """Cross two axes of a study, averaged trial by trial over the rest."""
    from .reporting import pivot_command

    pivot_command.pivot(stores, rows, columns, by, metric, relative, out, overwrite)


@app.command()
@guarded
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A results folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another results folder.")],
    samples: Annotated[int, typer.Option("--samples", min=100, help="Bootstrap samples.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare two runs: what differed in settings, and in results."""
    from .reporting import compare as comparing

    comparing.compare(a, b, samples, seed)


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
def bench(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="llama-2-7b, llama-3-8b, opt-13b or cpu-small.")
    ] = "cpu-small",
    arms: Annotated[
        str, typer.Option(metavar="NAME,...", help="What is timed against each other.")
    ] = "dense,ideal,pp,pp-frozen,pp-reference",
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE,...", help="float32, bfloat16, float16.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="ROWSxLENGTH,...", help="Such as 20x256,4x128.")] = None,
    ratio: Annotated[str, typer.Option(metavar="RATIO,...", help="Share of the units to cut.")] = "0.4",
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; the preset's by default.")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(metavar="LAYER,...", help="Layers left untouched; '' for none.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; all cores by default.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes of every arm.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed ones before.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Processor seconds, not the wall clock's.")] = False,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and tokens.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write bench.json and bench.md there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing benchmark.")] = False,
) -> None:
    """Time PP against the dense model and one sliced beforehand.

    Random weights of a chosen shape; several dtypes, batches and ratios are measured in turn.
    """
    from . import printing
    from .bench import command

    printing.quiet()
    asked = dict(preset=preset, arms=arms, dtype=dtype, batch=batch, ratio=ratio, layers=layers, skip=skip_layers)
    asked |= dict(threads=threads, rounds=rounds, warmup=warmup, device=device, cpu_time=cpu_time, settings=settings or (), seed=seed)
    command.bench(**asked, out=out, overwrite=overwrite)


@app.command()
@guarded
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A pipeline file or an ablation file (YAML).")],
    settings: Settings = None,
    plugin: PluginFiles = None,
) -> None:
    """Check a pipeline file or an ablation file without loading a model.

    Reports all mistakes at once, each with its place.
    """
    from . import printing
    from .ablation import command
    from .ablation.study_file import is_study

    if is_study(file):
        return command.validate(file, settings or (), plugin or ())
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
def schema(
    plugin: PluginFiles = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Of ablation files instead.")] = False,
) -> None:
    """Print the JSON Schema of pipeline files, plugins included."""
    import json

    from .schema import ablation_schema, pipeline_schema

    made = (ablation_schema if ablation else pipeline_schema)(_catalog(plugin))
    typer.echo(json.dumps(made, indent=2))


def _read(file: Path, settings: list[str] | None, plugins: list[Path] | None, overwrite: bool = False) -> Any:
    from . import printing
    from .spec import PipelineSpec

    changes = list(settings or ())
    if overwrite:
        changes.append("output.overwrite=true")
    spec = PipelineSpec.load(file, changes, plugins or ())
    printing.catalog_problems(spec.catalog)
    return spec


def _catalog(plugins: list[Path] | None) -> Catalog:
    from ..registry import Catalog
    from . import printing

    catalog = Catalog.discover(plugins or ())
    printing.catalog_problems(catalog)
    return catalog
