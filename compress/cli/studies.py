"""The commands for studies, reports and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Commands, PluginFiles, Settings

if TYPE_CHECKING:
    from ..ablation.trials import StoredTrial

# The commands import torch and what needs it when they run, so that --help and --version answer at once.


def ablate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ablation file (YAML).")],
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="STORE", help="The results store; results/FILE.sqlite by default.")
    ] = None,
    plugin: PluginFiles = None,
    engine: Annotated[str, typer.Option("--engine", metavar="local|ray", help="Where the trials run.")] = "local",
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Workers of the ray engine.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Address of a running Ray cluster, such as auto.")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Continue a store whose ablation file has changed.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
) -> None:
    """Run an ablation study: a pipeline with some of its fields varied.

    Every finished trial is stored at once. The same command continues a stopped study.
    """
    from ..ablation import command
    from ..output import printing

    printing.quiet()
    command.ablate(file, settings or (), plugin or (), out, engine, workers, address, update, retry, show=show_trials)


def report(
    source: Annotated[Path, typer.Argument(metavar="STORE_OR_FOLDER", help="An ablation's store or a results folder.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the report goes.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
) -> None:
    """Write a report of a study or a run: HTML, tables and plots."""
    from ..output import printing
    from ..reporting import command

    printing.quiet()
    command.report(source, out, overwrite)


def pivot(
    stores: Annotated[
        list[Path], typer.Argument(metavar="STORE", help="Results stores; several become the axis store.")
    ],
    rows: Annotated[str, typer.Option("--rows", metavar="AXIS", help="The axis whose values are rows.")],
    columns: Annotated[str, typer.Option("--columns", metavar="AXIS", help="The axis whose values are columns.")],
    by: Annotated[
        str | None, typer.Option(metavar="AXIS", help="One table for each value of this axis, and one over all.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="LABEL.VALUE", help="Such as prr.prr; default: quality.")
    ] = None,
    relative: Annotated[
        str, typer.Option(metavar="AXIS=VALUE,...|dense", help="What the values are compared with.")
    ] = "dense",
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write tables and heat maps there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing cross tables.")] = False,
) -> None:
    """Show a table of two axes, averaged over the others."""
    from ..reporting import pivot_tables as crossing

    crossing.pivot(stores, rows, columns, by, metric, relative, out, overwrite)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A results folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another results folder.")],
    samples: Annotated[int, typer.Option("--samples", min=100, help="Bootstrap samples.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
) -> None:
    """Compare the settings and the results of two runs."""
    from ..reporting import compare as comparing

    comparing.compare(a, b, samples, seed)


def bench(
    preset: Annotated[
        str, typer.Option(metavar="NAME", help="llama-2-7b, llama-3-8b, opt-13b, smollm2-135m or cpu-small.")
    ] = "cpu-small",
    arms: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="What is timed; default: dense, ideal and three of PP.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(metavar="DTYPE,...", help="float32, bfloat16, float16.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="ROWSxLENGTH,...", help="Such as 20x256,4x128.")] = None,
    ratio: Annotated[str | None, typer.Option(metavar="RATIO,...", help="Shares of the units to cut.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers; default: the preset's.")] = None,
    skip_layers: Annotated[
        str | None, typer.Option(metavar="LAYER,...", help="Layers that are not pruned; '' for none.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: all cores.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes of every arm.")] = 15,
    warmup: Annotated[int, typer.Option(min=0, help="Untimed passes before them.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Measure processor seconds, not wall-clock time.")
    ] = False,
    page_faults: Annotated[
        bool, typer.Option("--page-faults", help="Include page faults of the system's malloc.")
    ] = False,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and tokens.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Write bench.json and bench.md there.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing benchmark.")] = False,
) -> None:
    """Time PP against the dense model and a model sliced in advance.

    The models have random weights of a chosen shape. Every combination of --dtype, --batch and --ratio is measured;
    without any of the three, the preset's usual combinations.
    """
    from ..bench import command
    from ..output import printing

    printing.quiet()
    command.bench(
        preset=preset,
        arms=arms,
        dtype=dtype,
        batch=batch,
        ratio=ratio,
        layers=layers,
        skip=skip_layers,
        threads=threads,
        rounds=rounds,
        warmup=warmup,
        device=device,
        cpu_time=cpu_time,
        page_faults=page_faults,
        settings=settings or (),
        seed=seed,
        out=out,
        overwrite=overwrite,
    )


COMMANDS: Commands = {"ablate": ablate, "report": report, "pivot": pivot, "compare": compare, "bench": bench}


def show_trials(path: Path, trials: Sequence[StoredTrial]) -> None:
    """Print the finished trials of a store as a table."""
    from ..ablation.command import part
    from ..output import printing
    from ..reporting.axes import axis_title
    from ..reporting.protocols import Protocols
    from ..reporting.summary import summarise
    from ..reporting.tables import head, table_rows
    from ..reporting.trials import read

    done = sum(trial.status == "done" for trial in trials)
    if done < len(trials):
        printing.say(f"{part(done, len(trials))} done")
    summary = summarise(read(path))
    rows = [row.texts for row in table_rows(summary, summary.metrics, Protocols())]
    left = max(1, len(summary.shown_axes))
    printing.show_wide_table(head(summary, summary.metrics), rows, left, f"prunekit report {path}")
    if summary.repeated:
        seeds = ", ".join(map(axis_title, summary.repeated))
        printing.say(f"Values are mean ± standard deviation over {seeds}.")
