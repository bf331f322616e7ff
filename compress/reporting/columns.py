"""Which values a report shows, what they are called, which way is better and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..output.formatting import number, share
from .findings import Findings, Trial, finite, setting_text

PLUGIN_VALUES = 6
"""Most values of evaluators that a report knows nothing about, in the main table; the other one has them all."""

TOLD_APART_BY = ("text", "convention", "window", "stride", "batch_size", "length", "tasks", "limit")
"""Protocol keys that tell two evaluators of one kind apart, the telling ones first."""


@dataclass(frozen=True)
class Column:
    """One value of one evaluator."""

    label: str
    """The evaluator's label in the results."""
    name: str
    """The value's name."""
    title: str
    meaning: str = ""
    better: str | None = None
    """``lower``, ``higher``, or None where neither is."""
    style: str = "number"
    """``number``, ``share`` (69%), ``accuracy`` (52.3%) or ``times`` (0.71)."""
    quality: bool = False
    """Whether it says how good the model's answers are."""
    relative: bool = False
    """Whether the pruned value is divided by the dense one."""
    of_dense: bool = False
    """Whether the evaluator gives it relative to the dense model, which so has 1."""
    rank: int = 0
    """Which of the main table's columns come first: 0 quality, cost, time and PRR, then 1, then 2."""

    @property
    def key(self) -> str:
        return f"{self.label}.{self.name}"

    def value(self, trial: Trial) -> Any:
        """The pruned model's value as results hold it; None where there is none."""
        outcome = trial.outcome(self.label)
        if outcome is None:
            return None
        value = outcome["pruned"].get(self.name)
        if not self.relative:
            return value
        dense = finite((outcome["dense"] or {}).get(self.name))
        return None if finite(value) is None or not dense else value / dense

    def dense(self, trial: Trial) -> Any:
        """The dense model's value; what is relative to it is 1 there, where the evaluator says nothing else."""
        outcome = trial.outcome(self.label)
        if outcome is None:
            return None
        if self.relative:
            return 1.0
        return (outcome["dense"] or {}).get(self.name, 1.0 if self.of_dense else None)

    def text(self, value: Any) -> str:
        """A value as people read it."""
        if finite(value) is None or self.style == "number":
            return number(value)
        if self.style == "share":
            return share(value)
        return f"{100 * value:.1f}%" if self.style == "accuracy" else f"{value:.2f}"

    def spread(self, mean: float, sd: float) -> str:
        """Mean and standard deviation, with as many decimals as the mean is written with."""
        scale = 100 if self.style in ("share", "accuracy") else 1
        shown = self.text(mean).rstrip("%")
        if "e" in shown:
            return f"{self.text(mean)} ± {number(sd)}"
        decimals = max(len(shown.partition(".")[2]), 1 if self.style == "share" else 0)
        unit = "%" if scale == 100 else ""
        if round(scale * sd, decimals) == 0:
            return self.text(mean)
        return f"{scale * mean:,.{decimals}f} ± {scale * sd:,.{decimals}f}{unit}"


PERPLEXITY = Column("", "perplexity", "perplexity", "of the text, per token", "lower", quality=True)

KNOWN: dict[str, tuple[Column, ...]] = {
    "perplexity": (
        PERPLEXITY,
        Column("", "word_perplexity", "word perplexity", "of the text, per word", "lower", quality=True),
    ),
    "zero_shot": (
        Column("", "mean", "zero-shot", "mean accuracy over the tasks", "higher", "accuracy", quality=True),
    ),
    "cost": (
        Column("", "flops_ratio", "FLOPs",
               "operations per token of a prefill, those of probe and compensation included, relative to dense",
               "lower", "share"),
        Column("", "parameters_ratio", "parameters", "parameters that stay, relative to dense", "lower", "share",
               rank=1),
    ),
    "latency": (
        Column("", "prefill_ratio", "prefill time", "seconds of a prefill, relative to dense", "lower", "times"),
        Column("", "decode_ratio", "decode time", "seconds of a decoded token, relative to dense", "lower", "times",
               rank=1),
    ),
    "memory": (
        Column("", "prefill_peak", "extra memory",
               "peak bytes of a prefill beyond weights and statistics, relative to dense; a cut model holds copies of "
               "the weights it keeps", "lower", "share", relative=True, rank=2),
    ),
    "prr": (
        Column("", "prr", "PRR", "perplexity points lost for every second of a batch saved", "lower"),
    ),
    "similarity": (
        Column("", "cka", "CKA", "linear CKA with the dense model's layers, mean", "higher", "number", rank=1),
    ),
    "overlap": (
        Column("", "full_batch", "overlap", "Jaccard overlap of the kept units with full-batch probing, mean", None,
               "times", rank=1),
        Column("", "chance", "overlap by chance", "Jaccard overlap of as many units drawn at random, mean", None,
               "times", rank=1),
    ),
}  # fmt: skip
"""Evaluator -> the values of it that the main table shows, and plots use."""

OF_DENSE = {
    "cost": ("flops_ratio", "floor_ratio", "parameters_ratio"),
    "latency": ("prefill_ratio", "decode_ratio"),
}
"""Evaluator -> its values that are relative to the dense model's as they are."""


def main_columns(findings: Findings) -> list[Column]:
    """The main table's columns, of what was measured: quality, cost, time, the rest, and what plugins measured."""
    evaluators = evaluators_of(findings)
    found: list[Column] = []
    for evaluator, known in KNOWN.items():
        labels = [label for label, name in evaluators.items() if name == evaluator]
        apart = _told_apart(findings, labels)
        found += [
            replace(column, label=label, title=column.title + apart[label], of_dense=_of_dense(evaluator, column.name))
            for label in labels
            for column in known
        ]
    found = sorted((column for column in found if measured(findings, column)), key=lambda column: column.rank)
    others = [column for column in all_columns(findings) if evaluators[column.label] not in KNOWN]
    return found + others[:PLUGIN_VALUES]


def all_columns(findings: Findings) -> list[Column]:
    """Every value of every evaluator, under its own name."""
    names: dict[tuple[str, str], None] = {}
    for trial in findings.done:
        for outcome in trial.outcomes:
            names.update({(outcome["label"], name): None for name in outcome["pruned"]})
    titles = {(label, name): f"{label}: {name}".replace("_", " ") for label, name in names}
    kinds = evaluators_of(findings)
    columns = [
        Column(label, name, titles[label, name], of_dense=_of_dense(kinds[label], name)) for label, name in names
    ]
    return [column for column in columns if measured(findings, column)]


def evaluators_of(findings: Findings) -> dict[str, str]:
    """Label -> evaluator, in the order in which they first ran."""
    return {outcome["label"]: outcome["evaluator"] for trial in findings.done for outcome in trial.outcomes}


def measured(findings: Findings, column: Column) -> bool:
    """Whether any trial has the value, or a note where it would be (PRR's, where no time is saved)."""
    for trial in findings.done:
        outcome = trial.outcome(column.label)
        if column.value(trial) is not None or (outcome and column.name in outcome["pruned"] and outcome.get("notes")):
            return True
    return False


def find(columns: Sequence[Column], evaluator_value: str) -> Column | None:
    """The column of a ``label.value``; of an ``evaluator.value`` the first, whatever number its label carries."""
    exact = next((column for column in columns if column.key == evaluator_value), None)
    evaluator, _, name = evaluator_value.rpartition(".")
    return exact or next((c for c in columns if c.label.partition(" ")[0] == evaluator and c.name == name), None)


def _of_dense(evaluator: str, name: str) -> bool:
    return name in OF_DENSE.get(evaluator, ())


def _told_apart(findings: Findings, labels: list[str]) -> dict[str, str]:
    """What to add to the titles of evaluators of one kind, so that they differ."""
    if len(labels) < 2:
        return dict.fromkeys(labels, "")
    outcomes = {label: next(t.outcome(label) for t in findings.done if t.outcome(label)) for label in labels}
    for key in TOLD_APART_BY:
        texts = {label: setting_text("", outcome["protocol"].get(key)) for label, outcome in outcomes.items()}
        if len(set(texts.values())) == len(labels):
            name = "" if key == "text" else f"{key.replace('_', ' ')} "
            return {label: f" ({name}{texts[label]})" for label in labels}
    return {label: f" {label.partition(' ')[2]}" for label in labels}
