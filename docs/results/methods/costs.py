"""What calibrating and cutting takes by each method of a study, and how a pruned prefill compares with the dense one.

python docs/results/methods/costs.py docs/studies/real/methods.yaml --only prune.ratio=0.4 text=matched

Processor time of one thread, which other programs disturb less than the time on the clock. *Cut* is calibration, choice
and refit, without loading. *Prefill* is the median of the pairs' ratios: pruned and dense in turn, in one process, on
the first tokens of the calibration text, after a pass of both that is not counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from time import process_time

import torch
from prunekit.compress.ablation.study import Study
from prunekit.compress.models.loading import load
from prunekit.compress.runs.matching import prune_as_asked
from prunekit.compress.runs.pipeline import calibration_of

HEAD = ("method", "cut, s", "prefill")


def options() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("study", type=Path)
    made.add_argument("--only", nargs="*", default=[], help="NAME=VALUE of the study's axes")
    made.add_argument("--methods", nargs="*", default=[], help="values of the last axis; all by default")
    made.add_argument("--rows", type=int, default=4, help="sequences of the prefill (4)")
    made.add_argument("--pairs", type=int, default=3, help="pruned and dense prefills, in turn (3)")
    return made.parse_args()


def taken(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Processor seconds of a prefill of ids (B, T)."""
    began = process_time()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return process_time() - began


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    study = Study.load(chosen.study)
    wanted = dict(each.split("=", 1) for each in chosen.only)
    loaded = None
    print(f"| {' | '.join(HEAD)} |\n|---|---:|---:|")
    for trial in study.trials:
        label = list(trial.settings.values())[-1]
        if any(str(trial.settings[name]) != value for name, value in wanted.items()):
            continue
        if chosen.methods and label not in chosen.methods:
            continue
        spec = trial.spec
        loaded = loaded or load(spec.model)
        batches, _ = calibration_of(spec.calibration, loaded)
        began = process_time()
        with prune_as_asked(
            spec, loaded, spec.prune, lambda items, *_: items, calibration=batches, catalog=spec.catalog
        ) as pruned:
            cut = process_time() - began
            ids = torch.cat([batch["input_ids"] for batch in batches])[: chosen.rows]
            ratios = []
            for number in range(chosen.pairs + 1):
                own = taken(loaded.model, ids)
                with pruned.dense():
                    ratios += [own / taken(loaded.model, ids)] * (number > 0)
        print(f"| {label} | {cut:.0f} | {median(ratios):.1%} |", flush=True)


if __name__ == "__main__":
    main()
