"""What the time that pruning saves costs in perplexity."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..registry import Evaluator, Measurement, Subject, hookimpl


class PerformanceRuntimeRatio(Evaluator):
    """PRR: the rise of perplexity for each second that a batch's prefill is faster than the dense model's.

    ``prr = (ppl_pruned - ppl_dense) / (time_dense - time_pruned)``, in perplexity points per second, and
    ``relative``, the relative rise divided by the relative saving, which depends on no machine's speed and no batch's
    size: ``(ppl_pruned / ppl_dense - 1) / (1 - time_pruned / time_dense)``. Lower is better, and below zero pruning
    improves perplexity. Where no time is saved there is no ratio: both are None, and a note says so.

    The run's first ``perplexity`` and ``latency`` are taken (with their defaults where it lists none), and
    what they have measured is not measured again. The dense time is the median of the timed prefills, the pruned one
    that times the median of the paired ratios: so a machine that slows down meanwhile is no saving.
    """

    paired: ClassVar[bool] = True
    paper: ClassVar[str] = "Probe Pruning, ICLR 2025, arXiv 2502.15618"

    name: Literal["prr"] = "prr"

    def evaluate(self, subject: Subject) -> Measurement:
        """Divide; raises what the perplexity and latency evaluators raise."""
        pruned, latency = subject.measure("perplexity"), subject.measure("latency")
        with subject.dense():
            dense = subject.measure("perplexity")
        perplexities = pruned.values.get("perplexity"), dense.values.get("perplexity")
        dense_seconds = latency.values["dense_prefill_seconds"]
        seconds = dense_seconds * latency.values["prefill_ratio"], dense_seconds
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
        f"the {which} perplexity is missing (too large to be written as a number), so there is no PRR"
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
