"""The commands that write pruned models, and that look after what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import PluginFiles, Settings, guarded

# Whatever imports torch is imported inside the commands, so that --help and --version answer at once.

Exported = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that prunekit export wrote.")]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Where the dense model of a dynamic export is now.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; required.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an existing exported folder.")]


@guarded
def export(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN_OR_YAML", help="A results folder of prunekit run, or a pipeline file.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="In what form; required; see --list.")
    ] = None,
    out: Out = None,
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
    from ..export import command
    from ..output import printing

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
        bool, typer.Option("--trust-remote-code", help="Run code of a dynamic base model, and of task folders.")
    ] = False,
) -> None:
    """Check an exported folder: files, loading, recorded numbers.

    Exit code 1 where something does not hold.
    """
    from ..export import verify as verifying
    from ..output import printing

    printing.quiet()
    if not verifying.verify(folder, base, plugin or (), measure, trust_remote_code):
        raise typer.Exit(1)


@guarded
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An exported folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Show what two exports kept differently."""
    from ..export import difference

    difference.show(a, b)


@guarded
def recover(
    folder: Exported,
    out: Out = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="A .txt or .jsonl file, or a bundled text, to train on."),
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="A hub dataset to train on instead.")] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="The dataset's configuration.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="The dataset's split; train.")] = None,
    field: Annotated[str | None, typer.Option("--field", help="Column that holds the text; text.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read at most this many documents.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of the optimiser.")] = 200,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the low-rank updates.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", min=0, help="Updates are scaled by alpha / rank.")] = 16,
    dropout: Annotated[float, typer.Option("--dropout", min=0, max=1, help="Of what the updates read.")] = 0.05,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=0, help="After a short warm-up.")] = 1e-4,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences run at once.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches that make one step.")] = 1,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of a sequence.")] = 256,
    sequences: Annotated[
        int | None, typer.Option("--sequences", min=1, help="Sequences to train on; as many as the steps can use.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of updates, sequences, order and dropout.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    plugin: PluginFiles = None,
    overwrite: Replace = False,
) -> None:
    """Train an exported model a little (LoRA), and write it anew.

    Needs prunekit[recover]. The new folder is loaded again, compared and measured before it appears.
    """
    from ..output import printing
    from ..recovery import command

    printing.quiet()
    source = dict(text=text, dataset=dataset, subset=subset, split=split, field=field, limit=limit)
    lora = dict(rank=rank, alpha=alpha, dropout=dropout, steps=steps, learning_rate=learning_rate)
    lora |= dict(batch_size=batch_size, accumulate=accumulate, seed=seed)
    options = dict(length=length, sequences=sequences, device=device, overwrite=overwrite, plugins=plugin or ())
    command.recover(folder, out, source, lora, **options)


COMMANDS = (export, verify, diff, recover)
