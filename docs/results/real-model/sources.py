"""The model and the texts of the scripts in this folder, and the loss on a text."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from prunekit.compress import prune
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource, source_data
from prunekit.compress.pruning.matching import Match
from prunekit.compress.runs.text import in_batches, sequences_of
from prunekit.registry import PrunekitError, SpecError
from prunekit.registry.tensors.windows import cut_windows, token_stream, with_bos
from torch import Tensor
from torch.nn import functional

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all scripts have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("texts", type=Path, nargs="+", help="text files; every one gives an equal share of the sequences")
    made.add_argument("--model", default="smollm2-135m", help="a name, a folder, a hub id or a GGUF (smollm2-135m)")
    made.add_argument("--sequences", type=int, default=16, help="of calibration (16)")
    made.add_argument("--length", type=int, default=512, help="tokens of a sequence (512)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    return made


def started(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model in float32 on the CPU, and its tokenizer."""
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    loaded = load(ModelSource(**source_data(options.model), dtype="float32", device="cpu"))
    return loaded.model, loaded.tokenizer


def mixture(tokenizer: Any, texts: Sequence[Path], count: int, length: int, further: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids (count, length) that take turns between the texts, and at least ``further`` more sequences of them.

    Each text's sequences are drawn with seed 0. Raises :class:`DataError` for a text that is too short.
    """
    if count % len(texts):
        raise SpecError(f"{count} sequences cannot be shared equally by {len(texts)} texts; give a multiple")
    each = count // len(texts) + math.ceil(further / len(texts))
    drawn = [
        sequences_of(tokenizer, path.read_text(encoding="utf-8"), each, length, 0, str(path), len(texts))
        for path in texts
    ]
    sequences = torch.stack(drawn, 1).reshape(-1, length)
    return sequences[:count], sequences[count:]


def first_windows(tokenizer: Any, path: Path, count: int, length: int) -> Tensor:
    """The first windows (count, length) of a text, one BOS before the first."""
    stream = with_bos(token_stream([path.read_text(encoding="utf-8")], tokenizer), tokenizer)
    return torch.stack([window.ids for window in cut_windows(stream, length, tail="drop")[:count]])


def loss(model: Any, windows: Tensor, batch: int = 4) -> float:
    """Mean loss of the predicted tokens in nats; windows (N, T)."""
    total = 0.0
    for ids in windows.split(batch):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def static_perplexity(
    chosen: argparse.Namespace, model: Any, sequences: Tensor, windows: Tensor, **options: Any
) -> str:
    """Perplexity on windows (N, T) where PP's score has cut once; sequences (N, T) are the calibration text.

    ``chosen`` are the options of :func:`cutting`.
    """
    static: dict[str, Any] = {"selector": None, "merger": None, "match": Match("parameters")}
    static |= {"ratio": chosen.ratio, "skip_layers": tuple(chosen.skip), "allocator": chosen.allocator}
    with prune(model, "pp", calibration=in_batches(sequences, 4), **static, **options):
        return f"{math.exp(loss(model, windows)):.1f}"


def cutting(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of scripts that cut and measure perplexity."""
    made.add_argument("--measure", type=Path, required=True, help="the text that perplexity is measured on")
    made.add_argument("--windows", type=int, default=10, help="of this text (10)")
    made.add_argument("--ratio", type=float, default=0.4, help="share of the decoder's parameters to cut (0.4)")
    made.add_argument("--skip", type=int, nargs="*", default=[0, 1, 2], help="layers that stay whole (0 1 2)")
    made.add_argument(
        "--allocator", type=yaml.safe_load, default="uniform", help="uniform, greedy or '{name: NAME, OPTION: ...}'"
    )
    return made


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of markdown; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def run(main: Callable[[], None]) -> None:
    """Call a script's main function; what is wrong with its options or texts becomes one line, and exit code 2."""
    try:
        main()
    except (PrunekitError, OSError, UnicodeDecodeError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
