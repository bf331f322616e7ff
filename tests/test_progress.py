"""What commands say of the time: the plan before they begin, then rate and time left."""

import pytest
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource
from prunekit.compress.output import printing
from prunekit.compress.output.pace import pace
from prunekit.compress.runs.measuring import Unpruned
from prunekit.compress.runs.plan import planned
from prunekit.evaluators.cost import Cost
from prunekit.evaluators.latency import Latency
from prunekit.evaluators.perplexity import Perplexity
from prunekit.evaluators.similarity import Similarity
from prunekit.evaluators.zero_shot import ZeroShot
from prunekit.registry import DataError, TextSource


@pytest.fixture(scope="module")
def loaded():
    return load(ModelSource())


@pytest.fixture
def lines(monkeypatch):
    """Lines on a stderr that is not a terminal, with a clock that is moved by hand."""
    said, now = [], [0.0]
    monkeypatch.setattr(printing, "err", printing.Console(stderr=True, force_terminal=False))
    monkeypatch.setattr(printing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(printing.Bars, "say", lambda self, line: said.append(line))

    def work(seconds, total):
        with printing.Bars() as bars:
            for _ in bars.track(range(total), "dense: perplexity", total):
                now[0] += seconds
        return said

    return work


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 4, 9.0, ""),
        (12, 60, 4.0, "3/s, about 16 s left"),
        (1, 65, 37.0, "37 s each, about 39 min left"),
        (4, 4, 2.0, "2/s"),
    ],
)
def test_rate_and_time_left(done, total, seconds, text):
    assert pace(done, total, seconds) == text


def test_without_a_terminal_there_is_a_line_a_minute_and_one_after_the_first_step(lines):
    assert lines(25.0, 10) == [
        "dense: perplexity, 10 steps",
        "dense: perplexity: 1/10, 25 s each, about 4 min left",
        "dense: perplexity: 4/10, 25 s each, about 2 min left",
        "dense: perplexity: 7/10, 25 s each, about 75 s left",
    ]


def test_what_is_short_has_one_line(lines):
    assert lines(5.0, 10) == ["dense: perplexity, 10 steps"]


def test_the_plan_counts_what_will_run(loaded):
    evaluators = [
        ("perplexity 1", Perplexity(window=64)),
        ("perplexity 2", Perplexity(window=64, limit=3)),
        ("cost", Cost(batch_size=2, length=16)),
        ("latency", Latency(batch_size=2, length=16, pairs=3)),
        ("similarity", Similarity(batch_size=2, length=16)),
        ("zero_shot", ZeroShot(limit=5)),
    ]
    lines = planned(None, evaluators, Unpruned(loaded), "dense and pruned")
    windows = int(lines[0].split("all ")[1].split()[0].replace(",", ""))
    assert windows > 100 and lines[0].endswith("windows of 64 tokens, fewer with limit; dense and pruned")
    assert [line.removeprefix("to do: ").removesuffix("; dense and pruned") for line in lines[1:]] == [
        "perplexity 2: 3 windows of 64 tokens",
        "cost: a batch of 2 x 16 tokens",
        "latency: 4 rounds of a batch of 2 x 16 tokens",
        "similarity: 2 batches of 2 x 16 tokens",
        "zero_shot: true_continuation: 5 documents each",
    ]


def test_a_text_that_is_too_short_is_found_by_the_plan(loaded):
    evaluator = Cost(text=TextSource(bundled="reference-evaluation"), batch_size=1_000_000)
    with pytest.raises(DataError, match="lower batch_size or length"):
        planned(None, [("cost", evaluator)], Unpruned(loaded), "dense")
