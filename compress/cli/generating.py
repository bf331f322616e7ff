"""The command that has a pruned model answer prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Commands, PluginFiles, Settings

if TYPE_CHECKING:
    from ..export.generating import Generated

# The command imports torch and what needs it when it runs, so that --help and --version answer at once.


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE_OR_EXPORT",
            help="A pipeline file or a results folder, pruned as it says; an exported folder; or any model as it is.",
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to answer; may be repeated.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="PROMPTS", help='JSON lines with {"prompt": ...} or {"messages": [...]}.'),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: greedy; else sample.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the samples.")] = 0,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Prompts that run together; strategies may decide per batch.")
    ] = 1,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message for chats.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Ask by the tokenizer's chat template, if it has one.")
    ] = True,
    dense: Annotated[bool, typer.Option("--dense", help="Have the dense model answer too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
    settings: Settings = None,
    plugin: PluginFiles = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Place of the dense model of a dynamic export.")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code of a dynamic export's base model.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where the answers go, as JSON lines; with --file to results/."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file of answers.")] = False,
) -> None:
    """Answer prompts with a pruned model, and measure how fast.

    In a terminal an answer is shown as it is written. Then come tokens per second, time to the first token, time per
    output token, kept units and bytes of the key/value cache.
    """
    import json
    from dataclasses import replace
    from datetime import datetime
    from functools import partial

    from ...registry import SpecError
    from ..export import answering
    from ..export.generating import generate as generated
    from ..output import printing
    from ..output.folders import whole_file
    from ..runs.prompts import prompts_of, read_prompts

    if (file is None) != bool(prompt):
        raise SpecError("a prompt is needed: --prompt TEXT, or several as --file prompts.jsonl (one of the two)")
    printing.quiet()
    asked = prompts_of(prompt or ()) if file is None else read_prompts(file)
    if file is not None and out is None and not as_json:
        out = Path("results") / f"generate-{Path(source).stem}-{datetime.now():%Y%m%d-%H%M%S}.jsonl"
    found: dict[str, Generated] = {}
    with ExitStack() as stack:
        unfinished = None if out is None else stack.enter_context(whole_file(out.expanduser(), overwrite))
        with printing.Bars() as bars:
            arguments = (settings or (), plugin or (), device, base, trust_remote_code, bars.track)
            model = stack.enter_context(answering.opened(source, *arguments))
        modes: dict[str, Callable[[], AbstractContextManager[Any]]] = {model.title: nullcontext}
        if dense:
            if model.pruned is None:
                raise SpecError(f"--dense: {source} is {model.title}, so there is no dense model here; leave it out")
            modes["dense"] = model.pruned.dense
        ask = partial(
            generated,
            model.pruned or model.loaded,
            asked,
            tokenizer=model.loaded.tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            system=system,
            chat=chat,
        )
        shown = file is None and not as_json
        live = shown and printing.out.is_terminal and batch_size == 1
        for title, mode in modes.items():
            if shown and dense:
                printing.say(f"{title}:")
            with mode():
                if live:
                    measured = ask(write=printing.write)
                else:
                    with printing.Bars() as bars:
                        measured = ask(progress=bars.track)
            found[title] = replace(measured, kept=measured.kept or model.kept)
            for each in found[title].answers if shown and not live else ():
                printing.say(each.text, whole=True)
        if unfinished is not None:
            text = "\n".join(answering.lines(list(found.values()))) + "\n"
            unfinished.write_text(text, encoding="utf-8")
    if as_json:
        return typer.echo(json.dumps(answering.as_data(found), indent=2, ensure_ascii=False))
    show(found)
    if out is not None:
        printing.say(f"answers: {out}", whole=True)


def show(found: Mapping[str, Generated]) -> None:
    """Print the measurements, a column for each model."""
    from rich.filesize import decimal

    from ..output import printing
    from ..output.formatting import number

    def milliseconds(seconds: float | None) -> str:
        return "-" if seconds is None else f"{number(1000 * seconds)} ms"

    runs = list(found.values())
    rows = [
        ("prompt tokens", *(str(run.record["prompt_tokens"]) for run in runs)),
        ("new tokens", *(str(run.record["new_tokens"]) for run in runs)),
        ("tokens per second", *(number(run.tokens_per_second) for run in runs)),
        ("time to first token", *(milliseconds(run.first_token_seconds) for run in runs)),
        ("time per output token", *(milliseconds(run.token_seconds) for run in runs)),
        ("key/value cache", *(decimal(run.cache_bytes) for run in runs)),
    ]
    for kind in runs[0].kept:
        rows.append((f"kept units, {kind}", *("{:,} of {:,}".format(*run.kept[kind]) for run in runs)))
    printing.show_table(("measurement", *found), rows)


COMMANDS: Commands = {"generate": generate}
