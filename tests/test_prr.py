"""PRR: what a saved second costs in perplexity; nothing is measured twice for it."""

from contextlib import contextmanager
from typing import ClassVar, Literal

import pytest
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.compress.runs.pipeline import Pipeline
from prunekit.compress.runs.report import metric_rows
from prunekit.evaluators.prr import PerformanceRuntimeRatio
from prunekit.registry import Catalog, Evaluator, Measurement, PlainSubject


def test_it_is_offered_as_a_plugin():
    assert Catalog.discover(block="").get("evaluators", "prr") is PerformanceRuntimeRatio


@pytest.fixture
def found():
    """PRR of given (pruned, dense) perplexities and seconds."""

    def evaluate(perplexities, seconds):
        mode = [0]

        @contextmanager
        def dense():
            mode[0] = 1
            yield
            mode[0] = 0

        def measure(evaluator):
            if evaluator == "perplexity":
                return Measurement({"perplexity": perplexities[mode[0]]}, {"window": 512})
            assert evaluator == "latency" and not mode[0]
            values = {"prefill_ratio": seconds[0] / seconds[1], "dense_prefill_seconds": seconds[1]}
            return Measurement(values, {"clock": "wall clock", "batch_size": 20})

        subject = PlainSubject(None)
        subject.dense, subject.measure = dense, measure
        return PerformanceRuntimeRatio().evaluate(subject)

    return evaluate


def test_points_for_each_second_that_is_saved(found):
    measured = found((16.0, 6.0), (3.0, 7.0))
    assert measured.values == {"prr": pytest.approx(2.5), "relative": pytest.approx((10 / 6) / (4 / 7))}
    assert measured.notes == []
    expected = {"pruned_perplexity": 16, "dense_perplexity": 6, "pruned_seconds": 3, "dense_seconds": 7}
    assert {key: measured.protocol[key] for key in expected} == pytest.approx(expected)
    assert measured.protocol["perplexity"] == {"window": 512}
    assert measured.protocol["latency"] == {"clock": "wall clock", "batch_size": 20}
    assert "perplexity points per second" in measured.protocol["prr"]


def test_relative_values_depend_on_no_machine(found):
    slow, fast = found((16.0, 6.0), (30.0, 70.0)).values, found((16.0, 6.0), (3.0, 7.0)).values
    assert slow["relative"] == pytest.approx(fast["relative"]) and slow["prr"] == pytest.approx(fast["prr"] / 10)


def test_a_better_perplexity_is_below_zero(found):
    assert found((5.0, 6.0), (3.0, 7.0)).values["prr"] == pytest.approx(-0.25)


@pytest.mark.parametrize("pruned", [7.0, 7.5])
def test_no_time_saved_is_said_with_both_times(found, pruned):
    measured = found((16.0, 6.0), (pruned, 7.0))
    assert measured.values == {"prr": None, "relative": None}
    assert measured.notes == [f"no time saved: a batch takes {pruned:g} s pruned and 7 s dense, so there is no PRR"]


@pytest.mark.parametrize(("perplexities", "which"), [((None, 6.0), "pruned"), ((16.0, None), "dense")])
def test_a_missing_perplexity_is_said(found, perplexities, which):
    measured = found(perplexities, (3.0, 7.0))
    assert measured.values == {"prr": None, "relative": None}
    assert len(measured.notes) == 1 and f"the {which} perplexity is missing" in measured.notes[0]
    assert len(found(perplexities, (7.0, 7.0)).notes) == 2


# Within a run


class Counting(Evaluator):
    """Counts how often it measures."""

    times: ClassVar[list] = []


class CountingPerplexity(Counting):
    """Stands in for perplexity."""

    name: Literal["perplexity"] = "perplexity"

    def evaluate(self, subject):
        self.times.append(self.name)
        return Measurement({"perplexity": len(subject.kept()[0, "mlp"]) / 10}, {"text": "none"})


class CountingLatency(Counting):
    """Stands in for latency."""

    paired: ClassVar[bool] = True
    name: Literal["latency"] = "latency"

    def evaluate(self, subject):
        self.times.append(self.name)
        return Measurement({"prefill_ratio": 1 / 3, "dense_prefill_seconds": 3.0}, {"clock": "none"})


def test_nothing_is_measured_twice(make_model, batches):
    Counting.times.clear()
    model = make_model("llama-gqa")
    perplexity, timed, prr = CountingPerplexity(), CountingLatency(), PerformanceRuntimeRatio()
    with prune(model, "magnitude", ratio=0.5, calibration=batches) as pruned:
        listed = (perplexity, timed, prr)
        measuring = Measuring(Loaded(model, None, {}), pruned, no_progress, {}, listed)
        dense = measuring.measure(perplexity, dense=True).values["perplexity"]
        kept = len(pruned.kept()[0, "mlp"])
        values = measuring.measure(prr).values
        for evaluator in listed:
            measuring.measure(evaluator)
    assert Counting.times == ["perplexity", "perplexity", "latency"]
    assert (dense, kept) == (19.2, 96)
    assert values["prr"] == pytest.approx((9.6 - 19.2) / 2)


def test_a_run_prints_and_reports_it(monkeypatch):
    """With the values of the run's own perplexity and latency, also where no time is saved."""
    small = {"batch_size": 2, "length": 16, "decode_steps": 0, "pairs": 1, "warmup": 0, "breakdown": False}
    text = {"name": "perplexity", "window": 32, "limit": 2, "batch_size": 2}
    spec = {"prune": {"use": "magnitude", "ratio": 0.2}, "evaluate": ["prr", {"name": "latency", **small}, text]}
    results = Pipeline(spec).measure()
    prr, latency, perplexity = results.record.metrics
    assert prr.protocol["pruned_perplexity"] == perplexity.pruned["perplexity"]
    assert prr.protocol["dense_perplexity"] == perplexity.dense["perplexity"]
    assert prr.protocol["dense_seconds"] == latency.dense["prefill_seconds"]
    paired = latency.dense["prefill_seconds"] * latency.pruned["prefill_ratio"]
    assert prr.protocol["pruned_seconds"] == paired
    assert prr.protocol["latency"] == latency.protocol
    prr = prr.model_copy(update={"pruned": {"prr": None, "relative": None}})
    assert ("prr", "-", "-", "") in metric_rows(results.record.model_copy(update={"metrics": [prr]}))
