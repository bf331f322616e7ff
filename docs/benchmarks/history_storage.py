"""Effect of storing PP's history in less memory on decisions and perplexity, over many batches: a page of markdown.

python docs/benchmarks/history_storage.py --out docs/benchmarks/history-storage.md
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from page_file import put
from prunekit.compress import prune
from prunekit.compress.bundled import MODEL, TEXTS
from prunekit.compress.runs.text import calibration_batches
from prunekit.registry.tensors.windows import token_stream
from torch import Tensor
from torch.nn import functional

STORAGES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float16 (roots)": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "pool 4": {"pool": 4},
    "pool 16": {"pool": 16},
    "pool 64": {"pool": 64},
    "float16, pool 16": {"dtype": "float16", "pool": 16},
}
"""The first is the baseline of the others."""


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="a folder (the bundled model)")
    parser.add_argument("--calibration", type=Path, default=TEXTS["docstrings-calibration"], help="a text file")
    parser.add_argument(
        "--text", type=Path, nargs="+", default=[TEXTS["reference-evaluation"], TEXTS["reference-calibration"]]
    )
    parser.add_argument("--sequences", type=int, default=32, help="of calibration (32)")
    parser.add_argument("--rows", type=int, default=20, help="of a batch (20)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (64)")
    parser.add_argument("--batches", type=int, help="at most; all of the text by default")
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--out", type=Path, help="write the page here instead of to stdout")
    return parser.parse_args(arguments)


def run(model: Any, calibration: list, batches: Tensor, ratio: float, storage: dict[str, Any]) -> dict[str, Any]:
    """Losses and kept units of the second half of the batches, and the bytes of the histories."""
    losses, half = [], len(batches) // 2
    given = dict(ratio=ratio, skip_layers=(0,), calibration=calibration, history=storage, trace=True)
    with prune(model, "pp", **given) as pruned, torch.no_grad():
        for ids in batches:
            logits = model(ids, use_cache=False).logits
            losses.append(float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())))
        kept = [(seen["kind"], set(seen["kept"])) for seen in pruned.trace if seen["batch"] >= half]
        return {"losses": losses[half:], "kept": kept, "bytes": pruned.held_bytes()["statistics"]}


def changed(plain: dict[str, Any], other: dict[str, Any], kind: str) -> float:
    """Share of the kept units that differ."""
    pairs = [(a, b) for (what, a), (_, b) in zip(plain["kept"], other["kept"], strict=True) if what == kind]
    return sum(len(a - b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


def page(chosen: argparse.Namespace, found: dict[str, dict[str, Any]], batches: Tensor) -> str:
    plain = next(iter(found.values()))
    base = math.exp(sum(plain["losses"]) / len(plain["losses"]))
    model = "the bundled one" if chosen.model == MODEL else chosen.model.name
    lines = [
        "# PP's history in less memory",
        "",
        f"Model: {model}; {chosen.ratio:.0%} cut, first layer not pruned, float32; calibrated on {chosen.sequences} "
        f"sequences of {chosen.calibration.name}, then {len(batches)} batches of {chosen.rows} x {chosen.length} of "
        f"{' and '.join(path.name for path in chosen.text)}, history updated with momentum 0.99. The values are of "
        "the second half of the batches, after the history has changed; *changed* is the share of the kept units that "
        "float32 without pooling does not keep.",
        "",
        "| stored as | memory | heads changed | channels changed | perplexity | relative |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, of in found.items():
        perplexity = math.exp(sum(of["losses"]) / len(of["losses"]))
        heads, channels = (f"{changed(plain, of, kind):.2%}" for kind in ("attention", "mlp"))
        memory = f"{of['bytes'] / plain['bytes']:.1%}"
        lines.append(f"| {name} | {memory} | {heads} | {channels} | {perplexity:.3f} | {perplexity / base - 1:+.2%} |")
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(chosen.model, dtype=torch.float32)
    model.eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chosen.model)
    documents = [chosen.calibration.read_text(encoding="utf-8")]
    calibration = calibration_batches(tokenizer, documents, chosen.sequences, chosen.length, 8, 0)
    stream = token_stream([path.read_text(encoding="utf-8") for path in chosen.text], tokenizer)
    size = chosen.rows * chosen.length
    count = min(len(stream) // size, chosen.batches or len(stream))
    batches = stream[: count * size].view(count, chosen.rows, chosen.length)
    found = {name: run(model, calibration, batches, chosen.ratio, storage) for name, storage in STORAGES.items()}
    put(page(chosen, found, batches), chosen.out)


if __name__ == "__main__":
    main()
