"""``prunekit demo``: every strategy on the bundled model, calibrated on another kind of text and on the same kind."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import Catalog, SpecError
from ..ablation.command import run_waiting
from ..ablation.store import Store
from ..ablation.study import Study
from ..ablation.trials import Planned
from ..files.reader import build_strategy
from ..files.spec import PipelineSpec
from ..files.yaml_file import YamlFile
from ..output import printing
from ..output.folders import RunFolder, write_json
from ..output.formatting import named_layers, table
from ..output.pace import duration
from ..runs.records import FORMAT, RESULTS, Comparison
from ..runs.results import Results
from .demo_report import HEAD, Row, sentences, table_rows

STRATEGIES = ("random", "magnitude", "wanda_sp", "flap", "pp", "full_batch_probing")
RATIOS = (0.2, 0.4)
SKIP_LAYERS = (0,)
MEASURED_ON = "reference-evaluation"
CALIBRATED_ON = {"other": "docstrings-calibration", "same": "reference-calibration"}
"""The two situations: text of another kind than it is measured on, as in PP's paper, and of the same kind."""

STORE = "demo.sqlite"
"""The store of finished runs, in the results folder."""

TASK, QUESTIONS = "true_continuation", 200
ACCURACY = f"zero_shot.{TASK}"

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

    @classmethod
    def of(cls, trial: Planned) -> Run:
        """The run that a trial of :func:`plan` is."""
        ratio, strategy, situation = trial.settings.values()
        return cls(strategy, ratio, situation, trial.spec)

    @property
    def file(self) -> str:
        return f"{self.strategy}-{100 * self.ratio:.0f}-{self.situation}.yaml"


@dataclass(frozen=True)
class Page:
    """What the demo shows of its runs."""

    caption: str
    head: tuple[str, ...]
    cells: list[tuple[str, ...]]
    rows: list[Row]
    remarks: list[str]
    skipped: tuple[int, ...]
    """Layers that are not pruned."""


def run(out: Path | None = None, overwrite: bool = False) -> None:
    """Compare all strategies on the bundled model, in the folder ``out`` (else results/demo)."""
    compare(plan(), out or Path("results") / "demo", overwrite, page_of)


def compare(study: Study, out: Path, overwrite: bool, page: Callable[[list[tuple[Run, Results]]], Page]) -> None:
    """Run what the folder ``out`` has no results of, print the table and write the results there.

    Every finished run is stored at once, and the same command continues a demo that was stopped.
    """
    began = time.perf_counter()
    folder = RunFolder(out, overwrite)
    path = folder.target / STORE
    if not path.is_file():
        folder.check()
    if overwrite and folder.target.exists():
        shutil.rmtree(folder.target)
    done = measure(path, study)
    made = page(done)
    write(folder.target, done, made)
    printing.say(made.caption)
    printing.show_table(made.head, made.cells, left=2)
    for sentence in made.remarks:
        printing.say(f"- {sentence}")
    printing.say(f"\nDone in {duration(time.perf_counter() - began)}. Results: {folder.target}", whole=True)
    printing.say("In pipelines/ is a file for each row: prunekit run FILE runs it again.")
    printing.say(f"Next: prunekit report {folder.target} makes a page of it, with plots.", whole=True)


def page_of(done: list[tuple[Run, Results]]) -> Page:
    """The page of the bundled model's runs."""
    rows = gather(done)
    return Page(CAPTION, HEAD, table_rows(rows), rows, sentences(rows, RATIOS), SKIP_LAYERS)


def plan() -> Study:
    """All runs as trials of a study; a strategy that needs no calibration runs once and counts for both situations."""
    catalog = Catalog.discover()
    free = [s for s in STRATEGIES if not build_strategy(catalog, s, {"ratio": RATIOS[0]}).needs_calibration]
    data = {
        "title": "Strategies compared",
        "base": {"calibration": {"sequences": SEQUENCES, "length": WINDOW}, "prune": {"skip_layers": [*SKIP_LAYERS]}},
        "vary": {
            "prune.ratio": [*RATIOS],
            "prune.use": [*STRATEGIES],
            "text": {
                situation: {"calibration.bundled": text, "evaluate": _evaluators(situation)}
                for situation, text in CALIBRATED_ON.items()
            },
        },
        "exclude": [{"prune.use": strategy, "text": "same"} for strategy in free],
    }
    return Study.load(YamlFile(Path("demo.yaml"), "", data, {}))


def _evaluators(situation: str) -> list[dict[str, Any]]:
    text = {"bundled": MEASURED_ON}
    found: list[dict[str, Any]] = [
        {"name": "perplexity", "text": text, "window": WINDOW, "batch_size": BATCH, "limit": WINDOWS}
    ]
    if situation == "other":
        found.append({"name": "zero_shot", "tasks": [TASK], "limit": QUESTIONS})
        found.append({"name": "cost", "text": text, "batch_size": BATCH, "length": WINDOW})
        only = {"pairs": PAIRS, "decode_steps": 0, "breakdown": False}
        found.append({"name": "latency", "text": text, "batch_size": BATCH, "length": WINDOW, **only})
    return found


def measure(path: Path, study: Study) -> list[tuple[Run, Results]]:
    """Run what the store at ``path`` lacks, on one loaded model; all runs and their results, in the study's order.

    Raises :class:`SpecError` where a run has failed; the others are stored.
    """
    with Store.create_or_resume(path, study) as store:
        run_waiting(store, study, retry=True)
        stored = {trial.key: trial for trial in store.trials}
    done = []
    for trial in study.trials:
        found = stored[trial.key]
        if found.result is None:
            raise SpecError(f"{trial.label} failed: {found.error}; the same command runs it again")
        done.append((Run.of(trial), Results(found.result, found.resolved or "")))
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
            row.accuracy = _pruned(found, ACCURACY)
            row.flops = _pruned(found, "cost.flops_ratio")
            row.parameters = _pruned(found, "cost.parameters_ratio")
            row.time = _pruned(found, "latency.prefill_ratio")
            row.compensated = made.spec.prune.compensate.name != "none"
            row.dynamic = made.spec.prune.dynamic
    first = done[0][1].metrics
    dense = first["perplexity.perplexity"]["dense"]
    accuracy = first[ACCURACY]["dense"] if ACCURACY in first else None
    return [Row("dense", None, dense, dense, accuracy, 1.0, 1.0, 1.0), *rows.values()]


def _pruned(metrics: Mapping[str, Any], name: str) -> Any:
    return metrics[name]["pruned"] if name in metrics else None


def write(folder: Path, done: list[tuple[Run, Results]], page: Page) -> None:
    """results.json, report.md and the pipeline file of every run; results.json appears last."""
    pipelines = folder / "pipelines"
    pipelines.mkdir(exist_ok=True)
    runs = []
    for made, results in done:
        (pipelines / made.file).write_text(results.resolved, encoding="utf-8")
        runs.append({"pipeline": f"pipelines/{made.file}", "situation": made.situation, **results.record.as_json()})
    lines = [
        "# Strategies compared",
        "",
        page.caption,
        "",
        *table(page.head, page.cells),
        "",
        *(f"- {sentence}" for sentence in page.remarks),
        "",
    ]
    lines += [
        f"Not pruned: {named_layers(page.skipped)}. Protocols, versions, fingerprints and kept units "
        "are in results.json; each file in pipelines/ runs one row again.",
        "",
    ]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    found = Comparison.model_validate({"format": FORMAT, "table": [vars(row) for row in page.rows], "runs": runs})
    partial = folder / f".{RESULTS}.partial"
    write_json(partial, found.as_json())
    os.replace(partial, folder / RESULTS)
