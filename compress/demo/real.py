"""``prunekit demo --model``: the strategies on a real model, with calibration text like and unlike the use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..ablation.mistakes import preflight
from ..ablation.study import Study
from ..files.yaml_file import YamlFile
from ..models import fetching
from ..models.named import MODELS
from ..models.source import source_data
from ..output import printing
from ..output.formatting import named_layers, number, share
from ..runs.results import Results
from . import demo
from .demo import CALIBRATED_ON, MEASURED_ON, Page, Run, gather
from .demo_report import SITUATIONS, Row, best_of

RATIOS = (0.2, 0.4)
SKIP_LAYERS = (0, 1, 2)

WHOLE_HEADS = {"prune.allocator": {"name": "uniform", "rounding": "to_channels"}}
"""Better at the same cost where key/value groups are few; ``pp_ls`` and ``reconstruct`` do the same."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "wanda_sp": WHOLE_HEADS,
    "flap": {},
    "reconstruct": {},
    "pp": WHOLE_HEADS,
    "pp_ls": {},
}
"""Strategies and their settings."""

SEQUENCES, LENGTH = 16, 512
WINDOWS, BATCH = 10, 10
"""Windows measured by default, and in a batch."""

HEAD = ("cut", "strategy", "other text", "same kind", "FLOPs", "parameters")


def run(model: str, windows: int = WINDOWS, out: Path | None = None, overwrite: bool = False) -> None:
    """Compare :data:`STRATEGIES` on a named model, which is fetched first, a hub id, a folder or a GGUF.

    Results go to ``out`` (else results/demo-MODEL). Raises :class:`SpecError`, and the errors of loading.
    """
    if model in MODELS:
        fetching.fetch(MODELS[model], lambda line: printing.say(line, whole=True))
    study = plan(source_data(model), windows)
    study.refuse(preflight(study.trials, {trial.key for trial in study.trials}, here=True))
    demo.compare(study, out or Path("results") / f"demo-{Path(model).name.removesuffix('.gguf')}", overwrite, page_of)


def plan(model: dict[str, Any], windows: int) -> Study:
    """All runs as trials of a study; dense windows are measured once for all of them."""
    perplexity = {"name": "perplexity", "text": {"bundled": MEASURED_ON}, "window": LENGTH, "batch_size": BATCH}
    perplexity |= {"limit": windows, "tail": "drop"}
    cost = {"name": "cost", "text": {"bundled": MEASURED_ON}, "batch_size": BATCH, "length": LENGTH}
    data = {
        "title": "Strategies on a real model",
        "match": "parameters",
        "base": {
            "model": model,
            "calibration": {"sequences": SEQUENCES, "length": LENGTH},
            "prune": {"skip_layers": [*SKIP_LAYERS]},
        },
        "vary": {
            "prune.ratio": [*RATIOS],
            "strategy": {name: {"prune.use": name, **settings} for name, settings in STRATEGIES.items()},
            "text": {
                situation: {
                    "calibration.bundled": text,
                    "evaluate": [perplexity, cost] if situation == "other" else [perplexity],
                }
                for situation, text in CALIBRATED_ON.items()
            },
        },
    }
    return Study.load(YamlFile(Path("demo.yaml"), "", data, {}))


def page_of(done: list[tuple[Run, Results]]) -> Page:
    """The table, its protocol, and a sentence on the best strategy of each ratio and situation."""
    rows = gather(done)
    record = done[0][1].record
    model, (perplexity, *_) = record.model, record.metrics
    tokens, windows = perplexity.protocol["tokens"], perplexity.protocol["windows"]
    caption = (
        f"Perplexity of {model.name} ({model.parameters:,} parameters, {model.form}) on {MEASURED_ON}: {tokens:,} "
        f"tokens in {windows} windows of {LENGTH}, {BATCH} in a batch. Calibrated on {SEQUENCES} sequences of {LENGTH} "
        f"tokens of {CALIBRATED_ON['other']} (other text) or of {CALIBRATED_ON['same']} (same kind); both are "
        "documentation of Python. All strategies cut the same share of the decoder's parameters, and do not prune "
        f"{named_layers(SKIP_LAYERS)}. "
        "Operations and parameters relative to dense, embeddings included; a dynamic strategy's probe and its memory "
        "still use all parameters."
    )
    return Page(caption, HEAD, cells_of(rows), rows, remarks_of(rows), SKIP_LAYERS)


def cells_of(rows: list[Row]) -> list[tuple[str, ...]]:
    """Cells under :data:`HEAD`; the ratio is written once for its block."""
    cells: list[tuple[str, ...]] = []
    last: float | None = None
    for row in rows:
        ratio = "" if row.ratio in (last, None) else share(row.ratio)
        last = row.ratio
        cells.append((ratio, row.title, number(row.other), number(row.same), share(row.flops), share(row.parameters)))
    return cells


def remarks_of(rows: list[Row]) -> list[str]:
    """The best strategy of each ratio and situation, and that this is one model."""
    dense, *others = rows
    found = []
    for ratio in dict.fromkeys(row.ratio for row in others):
        block = [row for row in others if row.ratio == ratio]
        for situation, words in SITUATIONS.items():
            best = best_of(block, situation)
            perplexity, before = getattr(best, situation), getattr(dense, situation)
            found.append(
                f"{share(ratio)}, {words}: {best.title} is best, {number(perplexity)} (dense {number(before)}, "
                f"x {perplexity / before:.3g})."
            )
    few = "One model, one text and few windows: differences of some percent are noise. --windows measures more."
    return [*found, few]
