"""``prunekit demo``: every strategy on the bundled model, calibrated on another kind of text and on the same kind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ...registry import Catalog
from ..calibration.passes import Progress, no_progress
from ..calibration.shared import SharedStatistics
from ..files.spec import PipelineSpec
from ..models.loading import load
from ..output import printing
from ..output.folders import RunFolder, write_json
from ..output.formatting import named_layers, table
from ..runs.measuring import Known
from ..runs.pipeline import Pipeline
from ..runs.records import FORMAT, RESULTS, Comparison
from ..runs.results import Results
from .demo_report import HEAD, Row, sentences, table_rows

STRATEGIES = ("random", "magnitude", "wanda_sp", "flap", "pp", "full_batch_probing")
RATIOS = (0.2, 0.4)
SKIP_LAYERS = (0,)
MEASURED_ON = "reference-evaluation"
CALIBRATED_ON = {"other": "docstrings-calibration", "same": "reference-calibration"}
"""The two situations: text of another kind than it is measured on, as in PP's paper, and of the same kind."""

TASK, QUESTIONS = "true_continuation", 200

WINDOW, BATCH = 256, 20
WINDOWS, SEQUENCES, PAIRS = 60, 32, 3
"""Windows measured, sequences calibrated on, pairs of passes timed."""

CAPTION = (
    f"Perplexity of the bundled model on {MEASURED_ON}, calibrated on {CALIBRATED_ON['other']} (other text) or on "
    f"{CALIBRATED_ON['same']} (same kind). Accuracy on {TASK} is calibrated on other text: {QUESTIONS} questions of "
    "four answers, standard error about 3 points. Operations, parameters of the units that stay (a dynamic strategy's "
    f"probe and its memory still use all) and time relative to dense, for a batch of {BATCH} x {WINDOW} tokens."
)


@dataclass
class Run:
    """One pruning of the model: a strategy, a ratio and the text it is calibrated on."""

    strategy: str
    ratio: float
    situation: str
    spec: PipelineSpec

    @property
    def file(self) -> str:
        return f"{self.strategy}-{100 * self.ratio:.0f}-{self.situation}.yaml"


def run(out: Path | None = None, overwrite: bool = False) -> None:
    """Run the comparison, print its table and write the results folder."""
    began = time.perf_counter()
    folder = RunFolder(out or Path("results") / f"demo-{datetime.now():%Y%m%d-%H%M%S}", overwrite)
    with folder.open() as partial:
        with printing.Bars() as bars:
            done = measure(bars)
        rows = gather(done)
        remarks = sentences(rows, RATIOS)
        write(partial, done, rows, remarks)
    printing.say(CAPTION)
    printing.show_table(HEAD, table_rows(rows), left=2)
    for sentence in remarks:
        printing.say(f"- {sentence}")
    printing.say(f"\nDone in {time.perf_counter() - began:.0f} s. Results: {folder.target}", whole=True)
    printing.say("results.json, report.md, and in pipelines/ a file for each row: prunekit run FILE runs it again")


def plan(catalog: Catalog) -> list[Run]:
    """All runs; what needs no calibration runs once and counts for both situations."""
    runs = []
    for ratio in RATIOS:
        for strategy in STRATEGIES:
            for situation in CALIBRATED_ON:
                made = Run(strategy, ratio, situation, _spec(strategy, ratio, situation, catalog))
                if situation == "other" or made.spec.prune.needs_calibration:
                    runs.append(made)
    return runs


def _spec(strategy: str, ratio: float, situation: str, catalog: Catalog) -> PipelineSpec:
    text = {"bundled": MEASURED_ON}
    perplexity = {"name": "perplexity", "text": text, "window": WINDOW, "batch_size": BATCH, "limit": WINDOWS}
    evaluate: list[Any] = [perplexity]
    if situation == "other":
        evaluate.append({"name": "zero_shot", "tasks": [TASK], "limit": QUESTIONS})
        evaluate.append({"name": "cost", "text": text, "batch_size": BATCH, "length": WINDOW})
        only = {"pairs": PAIRS, "decode_steps": 0, "breakdown": False}
        evaluate.append({"name": "latency", "text": text, "batch_size": BATCH, "length": WINDOW, **only})
    calibration = {"bundled": CALIBRATED_ON[situation], "sequences": SEQUENCES, "length": WINDOW}
    prune = {"use": strategy, "ratio": ratio, "skip_layers": SKIP_LAYERS}
    return PipelineSpec.of({"calibration": calibration, "prune": prune, "evaluate": evaluate}, catalog=catalog)


def measure(bars: printing.Bars) -> list[tuple[Run, Results]]:
    """Run the plan on one loaded model."""
    runs = plan(Catalog.discover())
    loaded = load(runs[0].spec.model)
    dense: Known = {}
    statistics = SharedStatistics()
    inner: Progress = bars.track if bars.shown else no_progress
    done: list[tuple[Run, Results]] = []
    for made in bars.track(runs, "strategies", len(runs)):
        if not bars.shown:
            bars.say(f"{len(done) + 1}/{len(runs)} {made.file.removesuffix('.yaml')}")
        done.append((made, Pipeline(made.spec).measure(inner, loaded, dense, statistics)))
    return done


def gather(done: list[tuple[Run, Results]]) -> list[Row]:
    """The table's rows: dense, then each strategy at each ratio with both calibrations next to each other."""
    rows: dict[tuple[str, float], Row] = {}
    for made, results in done:
        found = results.metrics
        row = rows.setdefault((made.strategy, made.ratio), Row(made.strategy, made.ratio))
        perplexity = found["perplexity.perplexity"]
        setattr(row, made.situation, perplexity["pruned"])
        if not made.spec.prune.needs_calibration:
            row.other = row.same = perplexity["pruned"]
        if made.situation == "other":
            row.accuracy = found[f"zero_shot.{TASK}"]["pruned"]
            row.flops = found["cost.flops_ratio"]["pruned"]
            row.parameters = found["cost.parameters_ratio"]["pruned"]
            row.time = found["latency.prefill_ratio"]["pruned"]
            row.compensated = made.spec.prune.compensate.name != "none"
            row.dynamic = made.spec.prune.dynamic
    first = done[0][1].metrics
    dense, accuracy = first["perplexity.perplexity"]["dense"], first[f"zero_shot.{TASK}"]["dense"]
    return [Row("dense", None, dense, dense, accuracy, 1.0, 1.0, 1.0), *rows.values()]


def write(folder: Path, done: list[tuple[Run, Results]], rows: list[Row], remarks: list[str]) -> None:
    """results.json, report.md and the pipeline file of every run."""
    (folder / "pipelines").mkdir()
    runs = []
    for made, results in done:
        (folder / "pipelines" / made.file).write_text(results.resolved, encoding="utf-8")
        runs.append({"pipeline": f"pipelines/{made.file}", "situation": made.situation, **results.record.as_json()})
    found = Comparison.model_validate({"format": FORMAT, "table": [vars(row) for row in rows], "runs": runs})
    write_json(folder / RESULTS, found.as_json())
    lines = [
        "# Strategies compared",
        "",
        CAPTION,
        "",
        *table(HEAD, table_rows(rows)),
        "",
        *(f"- {sentence}" for sentence in remarks),
        "",
    ]
    lines += [
        f"Not pruned: {named_layers(SKIP_LAYERS)}. Protocols, versions, fingerprints and kept units "
        "are in results.json; each file in pipelines/ runs one row again.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
