"""The page on operations, time and memory names every value and every part of time."""

from pathlib import Path

import pytest
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators import latency
from prunekit.evaluators.cost import Cost
from prunekit.evaluators.memory import Memory

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cost-and-time.md").read_text()


def section(name):
    return PAGE.split(f"\n## `{name}`\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("evaluator", [Cost(batch_size=1, length=8), Memory(batch_size=1, length=8, decode_steps=1)])
def test_every_value_is_explained(make_model, evaluator):
    model = make_model("llama-gqa")
    with prune(model, "magnitude", ratio=0.5) as pruned:
        subject = Measuring(Loaded(model, None, {}), pruned, no_progress, {})
        values = evaluator.evaluate(subject).values
    assert [name for name in values if f"`{name.removeprefix('dense_')}`" not in section(evaluator.name)] == []


def test_every_value_and_part_of_time_is_explained():
    values = latency.compared("prefill", [[1.0]], [[1.0]], tokens=1)
    for name in values:
        short = name.removeprefix("dense_").removeprefix("prefill")
        assert f"`prefill{short}`" in section("latency") or f"`*{short}`" in section("latency")
        assert f"`{name.removeprefix('dense_').replace('prefill', 'token')}`" in section("decode_latency") or (
            f"`*{short}`" in section("decode_latency")
        )
    assert all(f"`{name}`" in section("decode_latency") for name in ("first_token_seconds", "cache_bytes"))
    assert [part for part in latency.PARTS if f"`{part}`" not in section("latency")] == []
    assert "no time saved" in section("prr") and "`relative`" in section("prr")
