"""The decode_latency evaluator: what is timed, and the cache's bytes. Speed itself is not asserted."""

import pytest
from prunekit.compress import prune
from prunekit.evaluators import decode_latency
from prunekit.evaluators.decode_latency import DecodeLatency, Round
from prunekit.registry import Catalog, PlainSubject, SpecError
from prunekit.registry.checks import check_evaluation

ONE = dict(length=12, decode_steps=3, pairs=1, warmup=0)


def test_it_is_offered_and_keeps_the_rules(make_model):
    assert Catalog.discover(block="").get("evaluators", "decode_latency") is DecodeLatency
    check_evaluation(DecodeLatency(**ONE), PlainSubject(make_model("opt")))


def test_a_cut_of_key_value_groups_makes_the_cache_smaller(make_model, batches):
    model, passes = make_model("llama-gqa"), []
    with prune(model, "pp", ratio=0.5, skip_layers=[], calibration=batches, trace=True) as pruned:
        subject = PlainSubject(model)
        subject.dense = pruned.dense
        model.register_forward_pre_hook(
            lambda _, __, kw: passes.append((*kw["input_ids"].shape, kw["use_cache"])), with_kwargs=True
        )
        found = DecodeLatency(batch_size=8, **ONE).evaluate(subject)
        assert {record["batch"] for record in pruned.trace} == {0, 1}  # the short pass and the prompt; no step decides
    assert passes == [(1, 8, False), (8, 12, True), *[(8, 1, True)] * 3] * 2
    assert found.values["dense_cache_bytes"] == 3 * 2 * 8 * 4 * 15 * 16 * 4  # layers, keys and values, rows, heads, ...
    assert found.values["cache_bytes"] * 2 == found.values["dense_cache_bytes"]
    assert found.protocol["batch_size"] == 8 and found.protocol["length"] == 12
    assert all(value > 0 for value in found.values.values())


def test_ratios_are_paired_and_warm_up_is_left_out(make_model, monkeypatch):
    # pruned, dense: the warm-up, then two pairs
    rounds = iter([(100, 9), (1, 9), (2, 1), (4, 4), (3, 3), (4, 4)])
    monkeypatch.setattr(decode_latency, "one_round", lambda *_: (lambda a, b: Round(a, [b, b], 7))(*next(rounds)))
    values = (
        DecodeLatency(batch_size=2, length=4, decode_steps=2, pairs=2).evaluate(PlainSubject(make_model("opt"))).values
    )
    assert (values["first_token_seconds"], values["dense_first_token_seconds"]) == (2.5, 4)
    assert (values["first_token_ratio"], values["token_ratio"]) == (0.625, 0.5)
    assert (values["token_seconds"], values["token_tokens_per_second"], values["cache_bytes"]) == (2, 1, 7)


def test_steps_beyond_the_context_are_refused(make_model):
    subject = PlainSubject(make_model("llama-gqa"))
    with pytest.raises(SpecError, match=r"decode_latency.decode_steps: .* 256 tokens and 4 "):
        DecodeLatency(length=256, decode_steps=4).evaluate(subject)
