"""Rotary embeddings that depend on the longest text so far are left as they were."""

from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.runs.measuring import Measuring
from prunekit.registry import Evaluator, Measurement

KINDS = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "long_factor": [1.5] * 8,
        "short_factor": [1.0] * 8,
    },
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
CHANGING = ("dynamic", "longrope")


LONG = torch.arange(180).view(2, 90) % 90 + 3


class Long(Evaluator):
    """Runs the model on a long text."""

    name: Literal["long"] = "long"

    def evaluate(self, subject):
        subject.model(LONG, use_cache=False)
        return Measurement({"one": 1.0}, {"a": 1})


def held(model):
    """All that the rotary embedding holds: buffers, and what depends on lengths."""
    rotary = model.model.rotary_emb
    plain = {name: value for name, value in vars(rotary).items() if isinstance(value, (int, float, torch.Tensor))}
    return {name: torch.as_tensor(value).clone() for name, value in [*plain.items(), *rotary.named_buffers()]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_pruning_and_measuring_leave_the_frequencies(make_model, kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind]}
    model = make_model("llama-gqa", rope_parameters=rope, max_position_embeddings=64)
    before = held(model)
    with prune(model, "pp", ratio=0.4, calibration=[LONG]) as pruned:
        assert same(held(model), before), "calibration"
        measuring = Measuring(SimpleNamespace(model=model, tokenizer=None), pruned, no_progress, {})
        for dense in (True, False):
            measuring.measure(Long(), dense=dense)
            assert same(held(model), before), "measuring"
        pruned.freeze("mean-score", calibration=[LONG])
        assert same(held(model), before), "freezing"
        model(LONG, use_cache=False)
        assert same(held(model), before) == (kind not in CHANGING)
    assert same(held(model), before), "remove"
    assert model.model.rotary_emb.inv_freq is dict(model.named_buffers())["model.rotary_emb.inv_freq"]
    assert not [name for name in model.state_dict() if "inv_freq" in name]
