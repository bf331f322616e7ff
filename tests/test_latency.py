"""The latency evaluator: order of the passes, arithmetic, decode steps, protocol. Speed itself is not asserted."""

from contextlib import contextmanager

import pytest
import torch
from prunekit.compress import prune
from prunekit.evaluators import latency
from prunekit.evaluators.latency import Latency, Round, compared
from prunekit.evaluators.timing import percentile, processor
from prunekit.registry import Catalog, PlainSubject, SpecError


@pytest.fixture
def subject(make_model):
    """A real model; ``subject.shown`` records mode, ids and cached positions (None without a cache) of every pass."""
    model, mode = make_model("llama-gqa"), ["pruned"]

    @contextmanager
    def dense():
        mode[0] = "dense"
        try:
            yield
        finally:
            mode[0] = "pruned"

    def record(_, args, kwargs):
        cache = kwargs.get("past_key_values")
        filled = cache.get_seq_length() if cache is not None else 0 if kwargs["use_cache"] else None
        found.shown.append((mode[0], kwargs["input_ids"], filled))

    found = PlainSubject(model)
    found.dense = dense
    found.shown = []
    model.register_forward_pre_hook(record, with_kwargs=True)
    return found


def test_it_is_offered_as_a_plugin():
    assert Catalog.discover(block="").get("evaluators", "latency") is Latency


def test_pruned_and_dense_alternate_on_the_same_tokens(subject):
    Latency(batch_size=3, length=12, decode_steps=2, pairs=2, warmup=1).evaluate(subject)
    # in every round: a short pass in the same mode, the prefill, a prefill with a cache, and the steps
    shapes = [((1, 8), None), ((3, 12), None), ((3, 12), 0), ((3, 1), 12), ((3, 1), 13)]
    assert [(tuple(ids.shape), filled) for _, ids, filled in subject.shown] == shapes * 6
    assert [mode for mode, _, _ in subject.shown] == (["pruned"] * 5 + ["dense"] * 5) * 3
    first, *others = ([ids for _, ids, _ in subject.shown[start : start + 5]] for start in range(0, 30, 5))
    assert all(ids.equal(same) for other in others for ids, same in zip(other, first, strict=True))
    assert not first[3].equal(first[4])


def test_decoding_can_be_left_out(subject):
    values = Latency(batch_size=2, length=12, decode_steps=0, pairs=1, warmup=0).evaluate(subject).values
    assert [filled for _, _, filled in subject.shown] == [None] * 4
    assert {name.removeprefix("dense_").split("_")[0] for name in values} == {"prefill"}


def test_a_prefill_as_long_as_the_context_is_the_longest(subject):
    found = Latency(batch_size=1, length=4000, decode_steps=0, pairs=1, warmup=0).evaluate(subject)
    assert found.protocol["length"] == 256
    with pytest.raises(SpecError, match=r"latency.decode_steps: .* 256 tokens and 4 .* 260 positions.* length to 252"):
        Latency(batch_size=1, length=256, decode_steps=4, pairs=1).evaluate(subject)
    with pytest.raises(SpecError, match=r"context of 256; lower decode_steps"):
        Latency(batch_size=1, length=1, decode_steps=256, pairs=1).evaluate(subject)
    Latency(batch_size=1, length=252, decode_steps=4, pairs=1, warmup=0).evaluate(subject)


# Arithmetic


def test_ratios_are_paired_and_warm_up_is_left_out(subject, monkeypatch):
    # pruned, dense: the warm-up, then three pairs
    rounds = iter([(100, 9, 9), (1, 9, 9), (2, 1, 2), (4, 4, 4), (3, 3, 3), (4, 4, 4), (6, 5, 6), (12, 5, 5)])
    monkeypatch.setattr(latency, "one_round", lambda *_: (lambda first, *steps: Round(first, steps))(*next(rounds)))
    found = Latency(batch_size=2, length=4, decode_steps=2, pairs=3, warmup=1).evaluate(subject)
    assert found.values == {
        "prefill_seconds": 3,
        "prefill_p95": 6,
        "prefill_tokens_per_second": 8 / 3,
        "dense_prefill_seconds": 4,
        "dense_prefill_p95": 12,
        "dense_prefill_tokens_per_second": 2,
        "prefill_ratio": 0.5,
        "prefill_ratio_min": 0.5,
        "prefill_ratio_max": 0.75,
        "decode_seconds": 3,  # of 1 2 3 3 5 6
        "decode_p95": 6,
        "decode_tokens_per_second": 2 / 3,
        "dense_decode_seconds": 4,
        "dense_decode_p95": 5,
        "dense_decode_tokens_per_second": 0.5,
        "decode_ratio": 0.75,
        "decode_ratio_min": 0.375,
        "decode_ratio_max": 1.1,
    }


def test_the_95th_percentile_is_a_sample():
    assert percentile([3.0]) == 3
    assert percentile([5, 1, 4]) == 5
    assert percentile([*range(1, 20)]) == 19
    assert percentile([*range(20, 0, -1)]) == 19
    assert percentile([*range(1, 101)]) == 95


def test_values_do_not_mix_the_modes():
    values = compared("prefill", [[1.0], [1.0]], [[2.0], [4.0]], tokens=6)
    assert (values["prefill_seconds"], values["dense_prefill_seconds"]) == (1, 3)
    assert (values["prefill_ratio_min"], values["prefill_ratio"], values["prefill_ratio_max"]) == (0.25, 0.375, 0.5)


# Protocol and pruned models


def test_protocol_names_the_machine_the_clock_and_the_shapes(subject):
    seen = []
    subject.progress = lambda items, label, total: seen.append((label, total)) or items
    found = Latency(batch_size=1, length=20, decode_steps=2, pairs=2, warmup=0, seed=2).evaluate(subject)
    assert seen == [("latency", 2)]
    protocol = found.protocol
    assert (protocol["batch_size"], protocol["length"], protocol["decode_steps"]) == (1, 20, 2)
    assert (protocol["pairs"], protocol["warmup"], protocol["prefill_samples"]) == (2, 0, 2)
    assert protocol["decode_samples"].startswith("4,") and "nearest rank" in protocol["p95"]
    assert protocol["processor"] == processor() != "" and protocol["clock"] == "wall clock"
    assert (protocol["torch"], protocol["threads"]) == (torch.__version__, torch.get_num_threads())
    assert (protocol["dtype"], protocol["device"], protocol["text"]) == ("float32", "cpu", "random ids, seed 2")
    assert all(value > 0 for value in found.values.values())


def test_a_dynamic_cut_decides_in_the_prefill_and_keeps_to_it(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.5, skip_layers=[], calibration=batches, trace=True) as pruned:
        subject = PlainSubject(model)
        subject.dense = pruned.dense
        values = Latency(batch_size=2, length=20, decode_steps=3, pairs=1, warmup=0).evaluate(subject).values
        # three passes decide, the short one, the prefill and the one with a cache, and no step does
        assert {record["batch"] for record in pruned.trace} == {0, 1, 2}
    assert values["decode_ratio_min"] == values["decode_ratio"] == values["decode_ratio_max"] > 0


def test_a_model_compared_with_itself_needs_no_dense_mode(make_model):
    subject = PlainSubject(make_model("opt"))
    found = Latency(batch_size=1, length=8, decode_steps=2, pairs=2).evaluate(subject)
    assert found.values["prefill_ratio"] > 0 and found.values["decode_ratio"] > 0
    assert found.details == {}  # without sites there are no parts
