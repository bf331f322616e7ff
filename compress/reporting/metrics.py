"""Which values a report shows, their titles, which direction is better, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from ..output.formatting import ERROR, number
from .axes import finite, setting_text
from .trials import CUT, PARAMETERS, Study

PLUGIN_VALUES = 6
"""Maximum number of values of unknown evaluators in the main table; the complete table has all."""

DISTINGUISHED_BY = ("text", "convention", "window", "stride", "batch_size", "length", "prompt_length", "tasks", "limit")
"""Protocol keys that distinguish two evaluators of one kind in titles, the clearest first."""


@dataclass(frozen=True)
class Metric:
    """One value of one evaluator."""

    label: str
    """The evaluator's label in the results."""
    name: str
    """The value's name."""
    title: str
    meaning: str = ""
    better: str | None = None
    """``lower``, ``higher``, or None."""
    style: str = "number"
    """``number``, ``share`` (69%), ``accuracy`` (52.3%) or ``times`` (0.71)."""
    quality: bool = False
    """Whether it measures the quality of the model."""
    relative: bool = False
    """Whether reports divide the pruned value by the dense one."""
    rank: int = 0
    """Position group in the main table: 0 first, then 1, then 2."""
    exact: bool = False
    """Whether it counts what was cut, so that any difference is real."""
    timed: bool = False
    """Whether it depends on a clock: without repetitions or seeds nothing is known of its spread."""

    @property
    def key(self) -> str:
        return f"{self.label}.{self.name}"

    @property
    def sign(self) -> int:
        """Factor that makes lower better."""
        return -1 if self.better == "higher" else 1

    def pruned(self, frame: pd.DataFrame) -> pd.Series:
        """The pruned model's finite values by trial, NaN elsewhere."""
        values = self._column(frame, "pruned")
        return values / self._column(frame, "dense").replace(0, float("nan")) if self.relative else values

    def dense(self, frame: pd.DataFrame) -> pd.Series:
        """The dense model's finite values by trial, NaN elsewhere; 1 for a value that is relative to it."""
        return self._column(frame, "pruned") * 0 + 1 if self.relative else self._column(frame, "dense")

    def _column(self, frame: pd.DataFrame, side: str) -> pd.Series:
        missing = pd.Series(float("nan"), index=frame.index)
        return frame[side, self.key].map(finite).astype(float) if (side, self.key) in frame else missing

    def text(self, value: float | str | None) -> str:
        """A value as text."""
        known = None if isinstance(value, str) else finite(value)
        if known is None or self.style == "number":
            return number(value)
        return f"{100 * known:,.1f}%" if self.style in ("share", "accuracy") else f"{known:.2f}"

    def spread(self, mean: float, sd: float) -> str:
        """Mean and standard deviation, with the decimals of the mean."""
        percent = self.style in ("share", "accuracy")
        scale, unit = (100, "%") if percent else (1, "")
        shown = self.text(mean).rstrip("%")
        if "e" in shown:
            return f"{self.text(mean)} ± {number(sd)}"
        decimals = len(shown.partition(".")[2])
        if round(scale * sd, decimals) == 0:
            return self.text(mean)
        return f"{scale * mean:,.{decimals}f} ± {scale * sd:,.{decimals}f}{unit}"


LOWER, HIGHER = "lower", "higher"

REMOVED = Metric(
    CUT, PARAMETERS, "removed", "share of the decoder's parameters that was removed", style="share", exact=True
)
"""The achieved cut, which differs from the requested ratio where units cannot be divided."""

FLOPS = Metric(
    "cost", "flops_ratio", "FLOPs",
    "operations per token of a prefill, with those of probe and compensation, relative to dense", LOWER, "share",
    exact=True,
)  # fmt: skip

DECODER_FLOPS = Metric(
    "cost", "decoder_flops_ratio", "decoder FLOPs",
    "as FLOPs, without the output layer, which no strategy cuts", LOWER, "share", exact=True,
)  # fmt: skip

COSTS = {
    REMOVED.key: "removed {} of the decoder's parameters",
    DECODER_FLOPS.key: "used {} of the dense decoder's FLOPs",
    FLOPS.key: "used {} of dense's FLOPs",
    "latency.prefill_ratio": "took {}x dense's prefill time here",
}
"""How a sentence states what a configuration costs."""


def costs(metric: Callable[[str], Metric | None]) -> dict[str, Metric]:
    """Those of :data:`COSTS` that were measured, as ``metric`` finds them by name.

    Operations of the whole model are left out where those of the decoder are known.
    """
    found = {name: known for name in COSTS if (known := metric(name))}
    if DECODER_FLOPS.key in found:
        found.pop(FLOPS.key, None)
    return found


UNEQUAL = 0.01
"""Two costs are unequal if they differ by more than one percentage point: of parameters removed, or of FLOPs."""


def unequal(one: float | None, other: float | None) -> bool:
    """Whether two shares of cost, where both are known, differ by more than :data:`UNEQUAL`."""
    return one is not None and other is not None and abs(one - other) > UNEQUAL + 1e-9


KNOWN: dict[str, tuple[Metric, ...]] = {
    CUT: (REMOVED,),
    "perplexity": (
        Metric("", "perplexity", "perplexity", "of the text, per token", LOWER, quality=True),
        Metric("", "word_perplexity", "word perplexity", "of the text, per word", LOWER, quality=True),
    ),
    "zero_shot": (
        Metric("", "mean", "zero-shot", "mean accuracy over the tasks", HIGHER, "accuracy", quality=True),
    ),
    "continuation": (
        Metric("", "perplexity", "continuation perplexity", "of reference continuations after their prompts", LOWER,
               quality=True),
        Metric("", "agreement", "agreement", "share of the dense model's greedy tokens at the same place", HIGHER,
               "share", quality=True),
        Metric("", "repetition", "repetition", "share of repeated n-grams in greedy text", LOWER, "share", rank=1),
    ),
    "cost": (
        FLOPS,
        DECODER_FLOPS,
        Metric("", "parameters_ratio", "parameters", "parameters that one batch uses, relative to dense", LOWER,
               "share", rank=1, exact=True),
    ),
    "latency": (
        Metric("", "prefill_ratio", "prefill time", "seconds of a prefill, relative to dense", LOWER, "times",
               timed=True),
        Metric("", "decode_ratio", "decode time", "seconds of a decoded token, relative to dense", LOWER, "times",
               rank=1, timed=True),
    ),
    "decode_latency": (
        Metric("", "first_token_ratio", "time to first token", "seconds to the first new token, relative to dense",
               LOWER, "times", rank=1, timed=True),
        Metric("", "token_ratio", "time per token", "seconds of a further token, relative to dense", LOWER, "times",
               rank=1, timed=True),
        Metric("", "cache_bytes", "KV cache", "bytes of the key/value cache, relative to dense", LOWER, "share",
               relative=True, rank=1, exact=True),
    ),
    "memory": (
        Metric("", "prefill_peak", "extra memory",
               "peak bytes of a prefill beyond weights and statistics, relative to dense; a pruned model holds copies "
               "of the weights it keeps", LOWER, "share", relative=True, rank=2),
    ),
    "prr": (
        Metric("", "prr", "PRR, points/s", "points of perplexity lost per second of a batch saved", LOWER, timed=True),
    ),
    "similarity": (
        Metric("", "cka", "CKA", "linear CKA with the dense model's layers, mean", HIGHER, "number", rank=1),
    ),
    "overlap": (
        Metric("", "full_batch", "overlap", "Jaccard overlap of the kept units with full-batch probing, mean", None,
               "times", rank=1),
        Metric("", "chance", "overlap by chance", "Jaccard overlap of as many units drawn at random, mean", None,
               "times", rank=1),
    ),
}  # fmt: skip
"""Values in the main table and the plots, by evaluator."""


def main_metrics(study: Study) -> list[Metric]:
    """The main table's metrics, of those measured: quality, cost and time, the others, and those of plugins."""
    evaluators = evaluators_of(study)
    found: list[Metric] = []
    for evaluator, known in KNOWN.items():
        labels = [label for label, name in evaluators.items() if name == evaluator]
        suffixes = _suffixes(study, labels)
        found += [
            replace(metric, label=label, title=metric.title + suffixes[label]) for label in labels for metric in known
        ]
    found = sorted((metric for metric in found if _measured(study, metric)), key=lambda metric: metric.rank)
    others = [metric for metric in all_metrics(study) if evaluators[metric.label] not in KNOWN]
    return found + others[:PLUGIN_VALUES]


def all_metrics(study: Study) -> list[Metric]:
    """Every measured value of every evaluator, under its own name."""
    names = dict.fromkeys((m.label, name) for trial in study.done for m in trial.metrics for name in m.pruned)
    evaluators = evaluators_of(study)

    def style(label: str, name: str) -> str:
        mean = name == "mean" and evaluators[label] == "zero_shot"
        return "accuracy" if mean or (label, name + ERROR) in names else "number"

    found = [Metric(label, n, f"{label}: {n}".replace("_", " "), style=style(label, n)) for label, n in names]
    return [REMOVED, *(metric for metric in found if _measured(study, metric))]


def evaluators_of(study: Study) -> dict[str, str]:
    """Evaluator by label, in the order in which they first ran; the cut itself comes first."""
    return {CUT: CUT} | {metric.label: metric.evaluator for trial in study.done for metric in trial.metrics}


def find(metrics: Sequence[Metric], asked: str) -> Metric | None:
    """The metric ``label.value``, else the first ``evaluator.value`` whatever number its label has."""
    exact = next((metric for metric in metrics if metric.key == asked), None)
    evaluator, _, name = asked.rpartition(".")
    return exact or next((m for m in metrics if m.label.partition(" ")[0] == evaluator and m.name == name), None)


def _measured(study: Study, metric: Metric) -> bool:
    """Whether any trial has the value, or a note that explains its absence (PRR without saved time)."""
    if ("pruned", metric.key) not in study.frame:
        return False
    values = metric.pruned(study.frame) if metric.relative else study.frame["pruned", metric.key]
    return bool(values.notna().any()) or any(
        metric.name in found.pruned and found.notes for t in study.done if (found := t.metric(metric.label))
    )


def _suffixes(study: Study, labels: list[str]) -> dict[str, str]:
    """What distinguishes the titles of several evaluators of one kind, by label."""
    if len(labels) < 2:
        return dict.fromkeys(labels, "")
    protocols = {label: next(m.protocol for t in study.done if (m := t.metric(label))) for label in labels}
    for key in DISTINGUISHED_BY:
        texts = {label: setting_text("", protocol.get(key)) for label, protocol in protocols.items()}
        if len(set(texts.values())) == len(labels):
            name = "" if key == "text" else f"{key.replace('_', ' ')} "
            return {label: f" ({name}{texts[label]})" for label in labels}
    return {label: f" {label.partition(' ')[2]}" for label in labels}
