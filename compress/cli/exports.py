"""The commands that write pruned models, and that check, compare and train exported ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Commands, OutFolder, Overwrite, PluginFiles, Settings

# The commands import torch and what needs it when they run, so that --help and --version answer at once.

Exported = Annotated[Path, typer.Argument(metavar="DIR", help="An exported folder.")]
Base = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Current place of the dense model of a dynamic export.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The folder to write; required.")]
Replace = Annotated[bool, typer.Option("--overwrite", help="Replace an existing exported folder.")]


def export(
    source: Annotated[
        Path | None, typer.Argument(metavar="RUN_OR_YAML", help="A results folder of prunekit run, or a pipeline file.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="The format to write; required; see --list.")
    ] = None,
    out: Out = None,
    multiple: Annotated[
        int | None, typer.Option("--multiple", min=1, help="Keep MLP widths that are multiples of this.")
    ] = None,
    freeze: Annotated[
        str | None,
        typer.Option(
            "--freeze", metavar="HOW", help="Choose units once, not per batch: mean-score, last or calibration."
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", metavar="SIZE", help="Largest size of one weights file.")
    ] = "5GB",
    settings: Settings = None,
    plugin: PluginFiles = None,
    overwrite: Replace = False,
    list_profiles: Annotated[bool, typer.Option("--list", help="List the formats and where they run.")] = False,
) -> None:
    """Prune a model and write it to a folder.

    The written model is loaded, compared and measured before the folder appears.
    """
    from ..export import command
    from ..output import printing

    if list_profiles:
        return command.list_profiles(plugin or ())
    printing.quiet()
    options = dict(multiple=multiple, freeze=freeze, shard_size=shard_size, overwrite=overwrite)
    command.export(source, profile, out, settings or (), plugin or (), **options)


def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A hub id, a model's or an exported folder, or a pipeline file, whose prune is not used; the bundled "
            "model by default.",
        ),
    ] = None,
    settings: Settings = None,
    out: OutFolder = None,
    plugin: PluginFiles = None,
    base: Base = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of a dynamic export's base model.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a model or an export as it is.

    Writes a results folder. Perplexity and cost by default; --set evaluate=[latency] and so on change that.
    """
    from ..export import evaluating
    from ..output import printing
    from ..runs import report as tables

    printing.quiet()
    with printing.Bars() as bars:
        results = evaluating.run(
            source, settings or (), plugin or (), out, overwrite, base, trust_remote_code, bars.track, bars.say
        )
    printing.say(tables.headline(results.record))
    printing.show_table(("measurement", "value"), [(row[0], row[2]) for row in tables.metric_rows(results.record)])
    for note in results.record.notes:
        printing.warning(note)
    printing.say(f"results: {results.folder}", whole=True)


def verify(
    folder: Exported,
    base: Base = None,
    plugin: PluginFiles = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Repeat the recorded measurements.")] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of a dynamic export's base model and of task folders.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 also if something was not checked.")] = False,
) -> None:
    """Check an exported folder: files, loading, recorded numbers.

    Exit code 1 if a check fails. What cannot be checked here is named.
    """
    from ..export import verify as verifying
    from ..output import printing

    printing.quiet()
    if not verifying.verify(folder, base, plugin or (), measure, trust_remote_code, strict):
        raise typer.Exit(1)


def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="An exported folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another exported folder.")],
) -> None:
    """Compare the kept units of two exports."""
    from ..export import difference

    difference.show(a, b)


def recover(
    folder: Exported,
    out: Out = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="FILE", help="A .txt or .jsonl file, or a bundled text, to train on."),
    ] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="A hub dataset to train on instead.")] = None,
    subset: Annotated[str | None, typer.Option("--subset", help="The dataset's configuration.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="The dataset's split; default: train.")] = None,
    field: Annotated[str | None, typer.Option("--field", help="The column with the text; default: text.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Read at most this many documents.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps.")] = 200,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Rank of the low-rank updates.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", min=0, help="The updates are scaled by alpha / rank.")] = 16,
    dropout: Annotated[
        float, typer.Option("--dropout", min=0, max=1, help="Dropout on the input of the updates.")
    ] = 0.05,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", min=0, help="Learning rate after a short warm-up.")
    ] = 1e-4,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Sequences in a batch.")] = 8,
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Batches in one optimizer step.")] = 1,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens in a sequence.")] = 256,
    sequences: Annotated[
        int | None,
        typer.Option("--sequences", min=1, help="Sequences to train on; default: as many as the steps can use."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of updates, sequences, order and dropout.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    plugin: PluginFiles = None,
    overwrite: Replace = False,
) -> None:
    """Train an exported model with LoRA and write it to a new folder.

    Needs peft. The written model is loaded, compared and measured before the folder appears.
    """
    from ..output import printing
    from ..recovery import command

    printing.quiet()
    how: dict[str, Any] = dict(
        dataset=dataset, subset=subset, split=split, field=field, limit=limit, steps=steps, rank=rank
    )
    how |= dict(alpha=alpha, dropout=dropout, learning_rate=learning_rate, batch_size=batch_size)
    how |= dict(accumulate=accumulate, length=length, sequences=sequences, seed=seed)
    given = {key: value for key, value in how.items() if value is not None}
    command.recover(folder, out, text, given, device=device, overwrite=overwrite, plugins=plugin or ())


COMMANDS: Commands = {"export": export, "evaluate": evaluate, "verify": verify, "diff": diff, "recover": recover}
