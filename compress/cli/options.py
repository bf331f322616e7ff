"""Options that several commands have, and how mistakes and interruptions end a command."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import click
import typer

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

TRACEBACK = "PRUNEKIT_TRACEBACK"
"""Variable of the environment: unforeseen errors are printed with their traceback."""

Commands = dict[str, Callable[..., None]]
"""Functions of commands by the commands' names; main.py registers them."""


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: mistakes end it with one message and exit code 2, an interruption with 130 (SIGTERM: 143).

    An error that was not foreseen ends it with one message and exit code 1; its traceback is printed where the variable
    PRUNEKIT_TRACEBACK is set.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from ...registry import PrunekitError
        from ..output import printing, stopping
        from ..output.failures import blamed, described, explained

        stopping.begin()
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            printing.err.print(str(stop) or "interrupted; nothing was written", highlight=False, soft_wrap=True)
            raise typer.Exit(getattr(stop, "code", 130)) from None
        except (typer.Exit, click.exceptions.ClickException):
            raise
        except PrunekitError as error:
            printing.error(error)
            raise typer.Exit(2) from None
        except Exception as error:
            if os.environ.get(TRACEBACK):
                raise
            message = explained(error) or blamed(error)
            printing.error(message or f"{described(error)}; with {TRACEBACK}=1 it is shown where that was raised")
            raise typer.Exit(2 if message else 1) from None

    return run
