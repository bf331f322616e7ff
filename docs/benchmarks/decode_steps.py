"""Time of a decode step after a decision, compared with a model that was sliced beforehand: a table of markdown.

docs/results/generation/steps.md says what its columns are, and with which options its tables were made.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.bench.intervals import ratio_of
from prunekit.compress.bench.presets import PRESETS
from prunekit.compress.bench.slicing import sharing_copy, sliced
from prunekit.compress.bundled import MODEL
from prunekit.evaluators.timing import machine
from prunekit.registry.tensors.caches import cache_bytes

EVERY = 16
MLPS: dict[str, tuple[str, dict[str, Any]]] = {
    "per_prompt": ("pp", {"allocator": "mlp_only"}),
    "every_n": ("pp", {"allocator": "mlp_only", "policy": {"name": "every_n", "n": EVERY}}),
    "griffin (decode_only)": ("griffin", {}),
}
BOTH = {"per_prompt": ("pp", {"attention_unit": "kv_group"})}
CUTS = {"MLP channels": MLPS, "MLP channels and key/value groups": BOTH}
HEAD = (
    "model",
    "layers",
    "cut",
    "batch",
    "arm",
    "first token ms",
    "token ms",
    "token / sliced",
    "p10",
    "p90",
    f"{EVERY} tokens / per_prompt",
    "cache bytes",
)


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=PRESETS, help="random weights of this shape")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--bundled", action="store_true", help="the bundled model, too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 20], help="sequences (1 8 20)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--rounds", type=int, default=4, help=f"prompts, each with {2 * EVERY} counted steps (4)")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="processor time, which other processes do not change")
    parser.add_argument("--out", type=Path, help="write the table here, too, as csv")
    return parser.parse_args(arguments)


def arms_of(model: Any, cut: dict[str, tuple[str, dict[str, Any]]], ratio: float, length: int) -> dict[str, Any]:
    """Models with the same weights by name: dense, sliced beforehand, and pruned with each policy."""
    calibration = [torch.randint(3, model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))]
    arms, handles = {"dense": model, "sliced": None}, []
    for name, (strategy, more) in cut.items():
        arms[name] = sharing_copy(model)
        handles.append(prune(arms[name], strategy, ratio=ratio, calibration=calibration, **more))
    arms["sliced"] = sliced(model, handles[0].all_sites, handles[0].counts)
    return arms


def step(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    arguments = {} if cache is None else {"past_key_values": cache}
    return model(input_ids=ids, use_cache=True, logits_to_keep=1, **arguments).past_key_values


@torch.no_grad()
def measure(arms: dict[str, Any], rows: int, prompt: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of every arm's first token and of every step; the order of the arms changes from step to step.

    The first round, and the first step after each prompt, in which griffin copies weights, are not counted.
    """
    found: dict[str, Any] = {name: {"first": [], "steps": [], "bytes": 0} for name in arms}
    for number in range(rounds + 1):
        generator = torch.Generator().manual_seed(number)
        vocabulary = arms["dense"].config.vocab_size
        ids = torch.randint(3, vocabulary, (rows, prompt + 2 * EVERY + 1), generator=generator)
        caches: dict[str, Any] = dict.fromkeys(arms)
        for place, part in enumerate([ids[:, :prompt], *ids[:, prompt:].split(1, 1)]):
            turn = (number + place) % len(arms)
            for name in [*arms][turn:] + [*arms][:turn]:
                start = clock()
                caches[name] = step(arms[name], part, caches[name])
                taken = clock() - start
                if number and place != 1:
                    found[name]["steps" if place else "first"].append(taken)
        for name in arms:
            found[name]["bytes"] = cache_bytes(caches[name])
    return found


def blocks(seconds: list[float]) -> list[float]:
    """Seconds of every :data:`EVERY` steps, in which every_n chooses units once."""
    return [sum(seconds[start : start + EVERY]) for start in range(0, len(seconds), EVERY)]


def rows_of(model: str, layers: int, cut: str, rows: int, found: dict[str, Any]) -> list[tuple]:
    made = []
    for name, its in found.items():
        ratios = [a / b for a, b in zip(its["steps"], found["sliced"]["steps"], strict=True)]
        ten, *_, ninety = quantiles(ratios, n=10)
        average = ratio_of(blocks(its["steps"]), blocks(found["per_prompt"]["steps"]))
        made.append(
            (
                model,
                layers,
                cut,
                rows,
                name,
                f"{1000 * median(its['first']):.1f}",
                f"{1000 * median(its['steps']):.2f}",
                f"{median(ratios):.3f}",
                f"{ten:.3f}",
                f"{ninety:.3f}",
                f"{average.median:.3f}",
                its["bytes"],
            )
        )
    return made


def table(made: list[tuple]) -> str:
    rows = [HEAD, ("---", "---:", "---", "---:", "---", *("---:" for _ in HEAD[5:])), *made]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def protocol(chosen: argparse.Namespace, model: Any) -> str:
    about = machine(model)
    clock = "processor time of the process" if chosen.cpu_time else "wall clock"
    return (
        f"Prompts of {chosen.prompt} random tokens, {2 * EVERY} counted steps after each of {chosen.rounds} prompts, "
        f"{chosen.ratio:.0%} of the units cut, float32. Clock: {clock}. {about['processor']}, threads: "
        f"{about['threads']}, torch {about['torch']}."
    )


def main(arguments: list[str] | None = None) -> None:
    chosen = options(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    preset = PRESETS[chosen.shape]
    config = preset.config(chosen.layers or preset.layers, chosen.prompt + 2 * EVERY + 1)
    models = {f"{chosen.shape}, random": transformers.AutoModelForCausalLM.from_config(config)}
    if chosen.bundled:
        models["bundled"] = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    made: list[tuple] = []
    clock = time.process_time if chosen.cpu_time else time.perf_counter
    for name, model in models.items():
        model.eval().requires_grad_(False)
        for cut, which in CUTS.items():
            arms = arms_of(model, which, chosen.ratio, chosen.prompt + 2 * EVERY + 1)
            for rows in chosen.batch:
                found = measure(arms, rows, chosen.prompt, chosen.rounds, clock)
                made += rows_of(name, model.config.num_hidden_layers, cut, rows, found)
    print(protocol(chosen, model), table(made), sep="\n\n")
    if chosen.out is not None:
        with chosen.out.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([HEAD, *made])


if __name__ == "__main__":
    main()
