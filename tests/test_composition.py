"""Calibration and compositions: what is computed once, what is remembered, and that any part can be swapped."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration import passes


def test_the_weights_part_of_a_score_is_not_computed_by_batches(make_model, batches):
    from prunekit.strategies.pp.scorer import PPsp

    calls = []

    class Counting(PPsp):
        def prepare(self, weight, site):
            calls.append(tuple(weight.shape))
            return super().prepare(weight, site)

    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches, scorer=Counting()):
        # Once for the allocator; once more because the layout of the consumers' weights changes before the first batch.
        assert len(calls) == 12
        for batch in batches:
            model(**batch)
    assert len(calls) == 12


@pytest.mark.slow
def test_calibration_memory(make_model, batches):
    """Statistics are as long as the calibration sequences, however many there are and whatever the context."""
    model = make_model("llama-gqa", max_position_embeddings=131072)
    for repeats in (1, 4):
        with prune(model, "pp", ratio=0.4, calibration=batches * repeats) as pruned:
            assert {tuple(h.table.shape) for h in pruned._engine.histories()} == {(24, 128), (24, 192)}


def test_sequential_calibration_sees_the_layers_already_cut(make_model, batches):
    model = make_model("llama-gqa")
    kept = {}
    for sequential in (False, True):
        options = dict(ratio=0.5, calibration=batches, sequential=sequential, trace=True)
        with prune(model, "wanda_sp", **options) as pruned:
            kept[sequential] = {(r["layer"], r["kind"]): r["kept"] for r in pruned.trace}
    assert kept[True][0, "mlp"] == kept[False][0, "mlp"], "nothing is cut before the first layer"
    assert kept[True][2, "mlp"] != kept[False][2, "mlp"]


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_sequential_calibration_computes_every_layer_twice(make_model, batches, monkeypatch, family):
    """Once as it is calibrated and once cut; the statistics are those of passes through all layers."""
    model, calls, counts, tables = make_model(family), Counter(), [], []
    for number, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    for resumed in (passes.resumed, lambda *_: nullcontext()):
        monkeypatch.setattr(passes, "resumed", resumed)
        calls.clear()
        with prune(model, "wanda_sp", ratio=0.5, calibration=batches, sequential=True) as pruned:
            tables.append([history.table for history in pruned._engine.histories()])
        counts.append([calls[number] // len(batches) for number in range(3)])
    assert counts == [[2, 2, 1], [3, 2, 1]]
    assert all(torch.equal(one, other) for one, other in zip(*tables, strict=True))


@pytest.mark.slow
def test_compositions(make_model, batches):
    """Any piece can be swapped for any other that fits."""
    model = make_model("llama-gqa")
    ids = batches[0]["input_ids"]
    for strategy, options in [
        ("pp", {"scorer": "fluctuation"}),
        ("pp", {"scorer": "wanda_sp", "allocator": "global_adaptive"}),
        ("pp", {"compensate": "mean", "merger": {"name": "fixed_ratio", "probe": 0.3}}),
        ("pp", {"selector": "random", "merger": "probe_only", "seed": 3}),
        ("pp", {"selector": "hidden_norm", "merger": "history_only"}),
        ("flap", {"scorer": "ppsp"}),
        ("wanda_sp", {"compensate": "mean", "allocator": "global_adaptive"}),
        ("magnitude", {"compensate": "mean", "selector": None}),
    ]:
        with prune(model, strategy, ratio=0.4, calibration=batches, **options) as pruned:
            assert model(ids).logits.isfinite().all(), (strategy, options)
            assert pruned.active_parameters() < sum(p.numel() for p in model.parameters())
    explicit = {"name": "explicit", "attention": [0, 0.25, 0.5], "mlp": [0.5, 0, 0.25]}
    with prune(model, "pp", calibration=batches, allocator=explicit) as pruned:
        assert list(pruned.counts.values()) == [4, 96, 3, 192, 2, 144]


def test_random_probes_differ_and_repeat(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches, selector="random", trace=True) as pruned:
        model(**batches[0])
        pruned.reset()
        model(**batches[0])
    positions = [r["positions"] for r in pruned.trace]
    assert positions[:6] == positions[6:]
    assert len({tuple(p) for p in positions[:6]}) > 1
