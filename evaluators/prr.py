"""The rise of perplexity for each second that pruning saves."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from ..registry import Evaluator, Measurement, Subject, hookimpl


class PerformanceRuntimeRatio(Evaluator):
    """PRR: the rise of perplexity for each second that a batch's prefill is faster than the dense model's.

    ``prr = (ppl_pruned - ppl_dense) / (time_dense - time_pruned)``, in perplexity points per second, and
    ``relative``, the relative rise divided by the relative saving, which does not depend on the machine's speed or the
    batch's size: ``(ppl_pruned / ppl_dense - 1) / (1 - time_pruned / time_dense)``. Lower is better; below zero pruning
    improves perplexity. If no time is saved there is no ratio: both are None, and a note explains it.

    The values are those of the run's first ``perplexity`` and ``latency``, or of ones with default options if the run
    lists none; they are not measured again. The dense time is the median of the timed prefills. The pruned time is the
    dense one times the median of the paired ratios, so that a machine that slows down does not look like a saving.
    """

    paired: ClassVar[bool] = True
    paper: ClassVar[str] = "Probe Pruning, ICLR 2025, arXiv 2502.15618"

    name: Literal["prr"] = "prr"

    def evaluate(self, subject: Subject) -> Measurement:
        """Divide; raises the errors of the perplexity and latency evaluators."""
        pruned, latency = subject.measure("perplexity"), subject.measure("latency")
        with subject.dense():
            dense = subject.measure("perplexity")
        perplexities = pruned.values.get("perplexity"), dense.values.get("perplexity")
        dense_seconds, ratio = (latency.values[name] or math.nan for name in ("dense_prefill_seconds", "prefill_ratio"))
        seconds = dense_seconds * ratio, dense_seconds
        prr, relative, notes = ratios(perplexities, seconds)
        protocol = {
            "prr": "perplexity points per second of a batch's prefill that is saved",
            "relative": "relative rise of perplexity divided by the relative saving of time",
            "pruned_perplexity": perplexities[0],
            "dense_perplexity": perplexities[1],
            "seconds": "of a batch's prefill: dense the median, pruned that times the median of the paired ratios",
            "pruned_seconds": seconds[0],
            "dense_seconds": seconds[1],
            "perplexity": pruned.protocol,
            "latency": latency.protocol,
        }
        return Measurement({"prr": prr, "relative": relative}, protocol, notes)


def ratios(
    perplexities: tuple[float | None, float | None], seconds: tuple[float, float]
) -> tuple[float | None, float | None, list[str]]:
    """``prr``, ``relative`` and notes, of (pruned, dense) perplexities and (pruned, dense) seconds per batch."""
    notes = [
        f"the {which} perplexity is missing (it is too large for a number), so there is no PRR"
        for which, value in zip(("pruned", "dense"), perplexities, strict=True)
        if value is None
    ]
    pruned_seconds, dense_seconds = seconds
    if pruned_seconds >= dense_seconds:
        notes.append(
            f"no time saved: a batch takes {pruned_seconds:.4g} s pruned and {dense_seconds:.4g} s dense, so there is "
            "no PRR"
        )
    pruned, dense = perplexities
    if notes or pruned is None or dense is None:
        return None, None, notes
    rise, saved = pruned - dense, dense_seconds - pruned_seconds
    return rise / saved, (rise / dense) / (saved / dense_seconds), []


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [PerformanceRuntimeRatio]
