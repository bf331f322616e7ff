"""The commands that write pruned models, and that look after what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_base import OutFolder, PluginFiles, Settings, guarded

# Whatever imports torch is imported inside the commands, so that --help and --version answer at once.

Exported = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that prunekit export wrote.")]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Where the dense model of a dynamic export is now.")
]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an existing exported folder.")]


@guarded
def export(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN_OR_YAML", help="A results folder of prunekit run, or a pipeline file.")
    ] = None,
    profile: Annotated[str | None, typer.Option("--profile", metavar="NAME", help="In what form; see --list.")] = None,
    out: OutFolder = None,
    multiple: Annotated[
        int | None, typer.Option("--multiple", min=1, help="Kept MLP widths are a multiple of this.")
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option("--freeze", metavar="HOW", help="Decide once, not per batch: mean-score, last or calibration."),
    ] = None,
    shard_size: Annotated[str, typer.Option("--shard-size", metavar="SIZE", help="Of one weights file.")] = "5GB",
    settings: Settings = None,
    plugin: PluginFiles = None,
    overwrite: Replace = False,
    list_profiles: Annotated[bool, typer.Option("--list", help="Say what can be written and where it runs.")] = False,
) -> None:
    """Prune and write a model that can be loaded again.

    The folder is loaded again, compared and measured before it appears.
    """
    from . import printing
    from .export import command

    if list_profiles:
        return command.list_profiles()
    printing.quiet()
    options = dict(multiple=multiple, freeze=freeze, shard_size=shard_size, overwrite=overwrite)
    command.export(source, profile, out, settings or (), plugin or (), **options)


@guarded
def verify(
    folder: Exported,
    base: Base = None,
    plugin: PluginFiles = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure again what was recorded.")] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a dynamic export's base model.")
    ] = False,
) -> None:
    """Check an exported folder: files, loading, recorded numbers.

    Exit code 1 where something does not hold.
    """
    from . import printing
    from .export import verify as verifying

    printing.quiet()
    if not verifying.verify(folder, base, plugin or (), measure, trust_remote_code):
        raise typer.Exit(1)


@guarded
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An exported folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Show what two exports kept differently."""
    from .export import difference

    difference.show(a, b)


COMMANDS = (export, verify, diff)
