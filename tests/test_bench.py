"""prunekit bench: honest ratios, arms that compute what they say, and every mistake one message."""

import dataclasses
import json
import random

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.bench import arms, measure, table
from prunekit.compress.bench.arms import Setting, build, close_all
from prunekit.compress.bench.intervals import ratio_of
from prunekit.compress.bench.presets import Case, Preset
from prunekit.compress.bench.public_code import FullWeightPPsp, IndexedSlice
from prunekit.compress.bench.slicing import sharing_copy, sliced
from prunekit.compress.calibration.passes import no_progress
from prunekit.registry import SpecError

TINY = {
    "llama": Preset("llama", 64, 192, 4, 2, 2, cases=(Case("float32", 3, 16),)),
    "opt": Preset("opt", 64, 192, 4, 4, 2, cases=(Case("float32", 3, 16),)),
}
EVERY = list(arms.TITLES)


def tiny(family="llama", **changes):
    given = dict(layers=2, dtype="float32", batch=4, length=24, ratio=0.5, skipped_layers=())
    return Setting(family, TINY[family], **{**given, **changes})


# Ratios


def test_the_interval_holds_the_median_as_often_as_it_says():
    draw = random.Random(0)
    for rounds in (6, 9, 15, 40):
        inside = 0
        for _ in range(2000):
            one = [1.1 * draw.lognormvariate(0, 0.2) for _ in range(rounds)]
            ratio = ratio_of(one, [1.0] * rounds)
            inside += ratio.low <= 1.1 <= ratio.high
        assert 0.94 < inside / 2000 < 0.995, rounds
    for rounds, ends in ((5, (1, 5)), (6, (1, 6)), (9, (2, 8))):
        ratio = ratio_of(range(1, rounds + 1), [1.0] * rounds)
        assert (ratio.low, ratio.high) == ends


def test_no_ratio_is_printed_where_the_noise_is_larger_than_the_effect():
    draw = random.Random(1)
    same = [draw.lognormvariate(0, 0.1) for _ in range(15)]
    other = [draw.lognormvariate(0, 0.1) for _ in range(15)]
    noise = ratio_of(same, other)
    assert not noise.significant and str(noise).startswith("noise (") and noise.data()["ratio"] is None
    slower = ratio_of([1.5 * seconds for seconds in same], same)
    assert slower.significant and str(slower) == "1.500 (1.500 to 1.500)" and slower.data()["ratio"] == 1.5
    few = ratio_of([1.5] * 5, [1.0] * 5)
    assert not few.significant and str(few) == "too few rounds (1.500 to 1.500)" and few.data()["ratio"] is None


# Arms


@pytest.mark.parametrize("family", list(TINY))
def test_the_ideal_arm_is_the_model_that_the_cut_leaves(family):
    """Sliced to the first units, it computes what the dense model does with the others zeroed."""
    setting = tiny(family)
    ids = arms.batch_of(setting, 0)
    built = {arm.name: arm for arm in build(setting, ["dense", "ideal", "pp"])}
    try:
        with torch.no_grad():
            small = built["ideal"].model(ids, use_cache=False).logits
            dense, counts = built["dense"].model, built["pp"].pruned.counts
            for site in built["pp"].pruned.sites:
                gone = torch.arange(counts[site.layer, site.kind], site.units)
                assert len(gone)
                consumer = dense.get_submodule(site.consumer)
                consumer.weight.data = consumer.weight.data.clone()
                consumer.weight.data[:, site.columns(gone)] = 0
            torch.testing.assert_close(small, dense(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
        assert not any(type(m).__name__ == "SiteLinear" for m in built["ideal"].model.modules())
    finally:
        close_all(list(built.values()))


def test_arms_share_the_weights_that_nobody_changes(make_model, batches):
    model = make_model("llama-gqa")
    other = sharing_copy(model)
    assert other is not model
    for one, copy in zip(model.parameters(), other.parameters(), strict=True):
        assert one is not copy and one.data_ptr() == copy.data_ptr()
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    with prune(other, "pp", ratio=0.4, calibration=batches), torch.no_grad():
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
        assert model.model.layers[0].mlp.down_proj.weight.is_contiguous()
    small = sliced(model, [], {})
    assert small.model.layers[0].mlp.up_proj.weight.data_ptr() == model.model.layers[0].mlp.up_proj.weight.data_ptr()


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_references_way_decides_the_same(make_model, batches, family, dtype):
    model = make_model(family).to(getattr(torch, dtype))
    found = []
    for options in ({}, {"scorer": FullWeightPPsp(dtype=dtype), "applier": IndexedSlice()}):
        with prune(model, "pp", ratio=0.4, calibration=batches, trace=True, **options) as pruned, torch.no_grad():
            logits = [model(b["input_ids"], use_cache=False).logits.float() for b in batches]
        found.append((logits, [r["kept"] for r in pruned.trace]))
    (one, kept), (other, same) = found
    if dtype == "float32":
        assert kept == same
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 if dtype == "float32" else 0.5)


def test_every_arm_of_pp_decides_the_same_but_the_one_ahead():
    names = [name for name in EVERY if name.startswith("pp") and name not in arms.COMPILED]
    built = build(tiny(), names)
    kept = {}
    try:
        with torch.no_grad():
            for arm in built:
                arm.decoder(input_ids=arms.batch_of(tiny(), 0), use_cache=False)
                kept[arm.name] = arm.pruned.kept()
    finally:
        close_all(built)
    ahead = kept.pop("pp-ahead")
    assert all(found == kept["pp"] for found in kept.values()) and ahead != kept["pp"]


def test_arms_change_what_the_user_set_and_nothing_else():
    options = {"selector": "random", "merger": "fixed_ratio"}
    built = {arm.name: arm.pruned.strategy for arm in build(tiny(options=options), ["pp", "pp-ahead", "pp-frozen"])}
    assert {strategy.selector.name for strategy in built.values()} == {"random"}
    assert {strategy.merger.name for strategy in built.values()} == {"fixed_ratio"}
    assert [built[name].selector.ahead for name in ("pp", "pp-ahead", "pp-frozen")] == [False, True, False]
    assert [built[name].merger.momentum for name in ("pp", "pp-ahead", "pp-frozen")] == [0.99, 0.99, 1]


def test_compiled_arms_are_compiled_in_their_own_way(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode: modes.append(mode))
    names = ["dense-compiled", "ideal-compiled", "dense-graphs", "ideal-graphs"]
    built = build(tiny(), names)
    assert [arm.name for arm in built] == names and all(arm.pruned is None for arm in built)
    assert sorted(modes) == ["default"] * 2 + ["reduce-overhead"] * 2
    assert {name: arms.VARIANTS[name].runtime for name in ("pp-compiled", "pp-graphs")} == {
        "pp-compiled": {"compile": "default"},
        "pp-graphs": {"compile": "reduce-overhead"},
    }
    assert arms.TITLES["ideal-graphs"] == "ideal, compiled with CUDA graphs"


# The measurement


@pytest.fixture(scope="module")
def measured():
    names = [name for name in EVERY if name not in arms.COMPILED]
    return measure.measure(tiny(), names, rounds=3, warmup=1, cpu_time=False, progress=no_progress)


def test_everything_is_measured(measured):
    assert set(measured.seconds) == {name for name in EVERY if name not in arms.COMPILED}
    assert all(len(seconds) == 3 and min(seconds) > 0 for seconds in measured.seconds.values())
    assert measured.flops["ideal"] < measured.flops["pp"] < measured.flops["dense"]
    assert measured.flops["pp-plain"] == measured.flops["pp-reference"] > measured.flops["pp"]  # reuses its probe
    assert all(peak > 0 for peak in measured.peak.values())
    steps = measured.steps["pp"]
    assert set(steps) == {"select", "probe", "score", "gather", "compensate", "history", "pass"}
    assert 0 < sum(seconds for step, seconds in steps.items() if step != "pass") < steps["pass"]
    frozen = measured.steps["pp-frozen"]
    assert frozen["history"] == 0 and steps["history"] > 0
    assert measured.overhead() == pytest.approx(
        (steps["select"] + steps["probe"] + steps["score"] + steps["history"]) / measured.dense_seconds
    )
    for key in ("threads", "dtype", "shape", "processor", "torch", "rounds", "tokens", "clock", "kept"):
        assert measured.protocol[key], key
    assert measured.protocol["kept"] == {"attention": "2 of 4", "mlp": "192 of 384"}


def test_tables_say_it(measured):
    rows = table.arms_rows(measured)
    same = {"pp-fused", "pp-sequential"}  # there is no CUDA device here
    assert [row[0] for row in rows] == [
        arms.TITLES[name] + (", same as PP here" if name in same else "") for name in measured.seconds
    ]
    assert rows[0][2] == "" and rows[0][4] == "1.000"
    steps = table.steps_rows(measured)
    assert [row[0] for row in steps] == [
        *["select", "probe", "score", "gather", "history", "the block itself", "decision overhead"]
    ]
    shares = [float(row[2].rstrip("%")) for row in steps[:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    page = table.markdown([measured, measured], "prunekit bench")
    assert page.count("Protocol:") == 2 and "| setting  " in page and "`prunekit bench`" in page
    json.dumps(table.data(measured))


def test_compiled_arms_are_compared_with_their_like(measured):
    two = {"dense": 2.0, "ideal": 1.0, "pp": 1.2, "dense-compiled": 1.6, "ideal-compiled": 0.8, "pp-compiled": 0.9}
    seconds = {name: [value] * 6 for name, value in two.items()}
    peak = dict.fromkeys(two, 1)
    found = dataclasses.replace(measured, seconds=seconds, peak=peak)
    rows = table.compiled_rows(found)
    assert [[row[0], *(cell[:5] for cell in row[1:])] for row in rows] == [
        ["dense, compiled", "0.800", "", "2.000"],
        ["ideal, compiled", "0.800", "0.500", ""],
        ["PP, compiled", "0.750", "0.562", "1.125"],
    ]
    usual, compiled = table.summary_rows([found])
    assert [cell[:5] for cell in usual[1:3]] == ["1.200", "0.600"]
    assert [cell[:5] for cell in compiled[1:3]] == ["1.125", "0.562"] and compiled[0].endswith("all compiled")
    assert [row[1] for row in table.compiled_rows(found, short=True)] == ["0.800", "0.800", "0.750"]
    assert len(table.summary_rows([measured])) == 1 and table.compiled_rows(measured) == []
    assert table.data(found)["arms"]["pp-compiled"]["to_ideal-compiled"]["ratio"] == pytest.approx(1.125)


def test_models_are_let_go_of_after_an_error(monkeypatch):
    closed = []
    monkeypatch.setattr(arms.Arm, "close", lambda self: closed.append(self.name))

    def fail(*_):
        raise SpecError("stop")

    monkeypatch.setattr(measure, "_timed", fail)
    with pytest.raises(SpecError, match="stop"):
        measure.measure(tiny(), ["dense", "pp"], 1, 0, False, no_progress)
    assert {"dense", "pp"} <= set(closed)
