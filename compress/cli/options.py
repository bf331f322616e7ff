"""Options that several commands have, and how mistakes and interruptions end a command."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

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

Commands = dict[str, Callable[..., None]]
"""Functions of commands by the commands' names; main.py registers them."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: stop as for Ctrl-C, with another exit code."""


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a command: mistakes end it with one message and exit code 2, an interruption with 130 (SIGTERM: 143)."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        from ..output import printing

        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            printing.err.print(str(stop) or "interrupted; nothing was written", highlight=False, soft_wrap=True)
            raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None
        except Exception as error:
            from ...registry import PrunekitError

            if not isinstance(error, PrunekitError):
                raise
            printing.error(error)
            raise typer.Exit(2) from None

    return run
