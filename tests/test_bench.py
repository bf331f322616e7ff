"""prunekit bench: honest ratios, arms that compute what they say, and every mistake one message."""

import dataclasses
import json
import random

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.bench import arms, command, measure, table
from prunekit.compress.bench.arms import Setting, build, close_all
from prunekit.compress.bench.intervals import rank_of, ratio_of
from prunekit.compress.bench.presets import PRESETS, Case, Preset
from prunekit.compress.bench.reference_way import FullWeightPPsp, IndexedSlice
from prunekit.compress.bench.slicing import sliced, twin
from prunekit.compress.calibration import no_progress
from prunekit.compress.cli import app
from prunekit.registry import SpecError
from typer.testing import CliRunner

TINY = {
    "llama": Preset("llama", 64, 192, 4, 2, 2, cases=(Case("float32", 3, 16),)),
    "opt": Preset("opt", 64, 192, 4, 4, 2, cases=(Case("float32", 3, 16),)),
}
EVERY = list(arms.TITLES)


def tiny(family="llama", **changes):
    given = dict(layers=2, dtype="float32", batch=4, length=24, ratio=0.5, skipped=())
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
    assert rank_of(5) == 0 and rank_of(6) == 0 and rank_of(9) == 1


def test_no_ratio_is_printed_where_the_noise_is_larger_than_the_effect():
    draw = random.Random(1)
    same = [draw.lognormvariate(0, 0.1) for _ in range(15)]
    other = [draw.lognormvariate(0, 0.1) for _ in range(15)]
    noise = ratio_of(same, other)
    assert not noise.told_apart and str(noise).startswith("noise (") and noise.data()["ratio"] is None
    slower = ratio_of([1.5 * seconds for seconds in same], same)
    assert slower.told_apart and str(slower) == "1.500 (1.500 to 1.500)" and slower.data()["ratio"] == 1.5


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
    other = twin(model)
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
    names = [name for name in EVERY if name.startswith("pp") and name != "pp-compiled"]
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


# The measurement


@pytest.fixture(scope="module")
def measured():
    names = [name for name in EVERY if "compiled" not in name]
    return measure.measure(tiny(), names, rounds=3, warmup=1, cpu_time=False, progress=no_progress)


def test_everything_is_measured(measured):
    assert set(measured.seconds) == {name for name in EVERY if "compiled" not in name}
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


def test_tables_say_it(measured):
    rows = table.arms_rows(measured)
    assert [row[0] for row in rows] == [arms.TITLES[name] for name in measured.seconds]
    assert rows[0][2] == "" and rows[0][4] == "1.000"
    steps = table.steps_rows(measured)
    assert [row[0] for row in steps] == [
        *["select", "probe", "score", "gather", "history", "the block itself", "decision overhead"]
    ]
    shares = [float(row[2].rstrip("%")) for row in steps[:-1]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    page = table.markdown([measured, measured], "prunekit bench")
    assert page.count("Protocol:") == 2 and "| where |" in page and "`prunekit bench`" in page
    json.dumps(table.data(measured))


def test_compiled_arms_are_compared_with_their_like(measured):
    two = {"dense": 2.0, "ideal": 1.0, "pp": 1.2, "dense-compiled": 1.6, "ideal-compiled": 0.8, "pp-compiled": 0.9}
    seconds = {name: [value, value] for name, value in two.items()}
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
    assert len(table.summary_rows([measured])) == 1 and table.compiled_rows(measured) == []
    assert table.data(found)["arms"]["pp-compiled"]["to_ideal-compiled"]["ratio"] == pytest.approx(1.125)


def test_layers_that_the_paper_skips_are_skipped_at_full_depth_only():
    chosen = dict(dtype=None, batch=None, ratio=None, skip=None, device="cpu", options={}, seed=0)
    (full,) = command.settings_of("llama-2-7b", layers=None, **chosen)
    assert (full.layers, full.skipped, full.dtype, full.ratio) == (32, (0, 1, 2), "bfloat16", 0.4)
    assert (full.batch, full.length) == (20, 1024)
    (few,) = command.settings_of("llama-2-7b", layers=4, **chosen)
    assert few.skipped == ()
    (asked,) = command.settings_of("llama-2-7b", layers=8, **{**chosen, "skip": "0,1"})
    assert asked.skipped == (0, 1)
    several = command.settings_of("cpu-small", layers=1, **{**chosen, "dtype": "float32,bfloat16", "batch": "4x8,2x4"})
    assert [(s.dtype, s.batch) for s in several] == [("float32", 4), ("bfloat16", 4), ("float32", 2), ("bfloat16", 2)]


def test_without_a_question_a_preset_is_measured_as_usual():
    asked = dict(layers=None, skip=None, device="cpu", options={}, seed=0)
    usual = command.settings_of("cpu-small", dtype=None, batch=None, ratio=None, **asked)
    assert [Case(s.dtype, s.batch, s.length, s.ratio) for s in usual] == list(PRESETS["cpu-small"].cases)
    assert {s.dtype for s in usual} == {"float32", "bfloat16"} and {s.batch for s in usual} == {20, 4}
    (one,) = command.settings_of("cpu-small", dtype=None, batch=None, ratio="0.3", **asked)
    assert (one.dtype, one.batch, one.length, one.ratio) == ("float32", 20, 256, 0.3)


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_are_the_models_shapes(name):
    preset = PRESETS[name]
    config = preset.config(1, 8)
    shape = {"llama-2-7b": (4096, 32, 32), "llama-3-8b": (4096, 32, 8), "opt-13b": (5120, 40, 40)}
    shape["cpu-small"] = (1024, 16, 16)
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert (config.hidden_size, config.num_attention_heads, kv_heads) == shape[name]
    with torch.device("meta"):
        import transformers

        whole = transformers.AutoModelForCausalLM.from_config(preset.config(preset.layers, 8))
    total = sum(parameter.numel() for parameter in whole.get_decoder().parameters()) / 1e9
    billions = {"llama-2-7b": 6.5, "llama-3-8b": 7.0, "opt-13b": 12.6, "cpu-small": 0.026}
    assert total == pytest.approx(billions[name], rel=0.02)


# The command


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *arguments])


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(command.PRESETS, "tiny", TINY["llama"])


def test_the_command_prints_tables_and_writes_them(small, tmp_path):
    out = tmp_path / "found"
    asked = ["--preset", "tiny", "--rounds", "2", "--batch", "2x16,1x8", "--threads", "1", "--out", str(out)]
    done = invoke(*asked)
    assert done.exit_code == 0, done.output
    for words in ("ideal (sliced beforehand)", "PP the reference's way", "decision overhead", "where", "1 thread"):
        assert words in done.output, words
    data = json.loads((out / "bench.json").read_text())
    assert data["format"] == 1 and len(data["settings"]) == 2
    assert set(data["settings"][0]["arms"]) == set(arms.DEFAULT)
    assert "PP / ideal" in (out / "bench.md").read_text()
    again = invoke(*asked)
    assert again.exit_code == 2 and "exists" in again.output
    assert invoke(*asked, "--overwrite", "--cpu-time", "--set", "prune.history.pool=4").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "llama-2-7"], "--preset: there is no preset 'llama-2-7' (did you mean 'llama-2-7b'?)"),
        (["--arms", "dense,ideel"], "--arms: there is no arm 'ideel' (did you mean 'ideal'?)"),
        (["--arms", "ideal,pp"], "--arms: the arm dense must be among them"),
        (["--dtype", "float64"], "--dtype: there are float32, bfloat16 and float16, found 'float64'"),
        (["--batch", "20"], "--batch: write sequences x tokens, such as 20x256; found '20'"),
        (["--ratio", "1.5"], "--ratio: a ratio is the share that is cut, between 0 and 1; found 1.5"),
        (["--ratio", "x"], "--ratio: expected a number, found 'x'"),
        (["--skip-layers", "0,1", "--layers", "2"], "all 2 layers are skipped"),
        (["--cpu-time", "--threads", "2"], "--cpu-time counts what the processor did for one thread"),
        (["--set", "model.name=x"], "--set model: a benchmark runs PP alone"),
        (["--set", "prune.ratio=0.2"], "--set prune.ratio: PP is what is measured"),
        (["--set", "prune.history.pol=4"], "history.pol: unknown key (did you mean 'pool'?)"),
        (["--device", "cuda"], "cuda was asked for"),
    ],
)
def test_mistakes_are_one_message(small, arguments, said):
    done = invoke("--preset", "tiny", "--rounds", "1", *arguments)
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
    assert isinstance(done.exception, SystemExit)


def test_models_are_let_go_of_after_an_error(small, monkeypatch):
    closed = []
    monkeypatch.setattr(arms.Arm, "close", lambda self: closed.append(self.name))

    def fail(*_):
        raise SpecError("stop")

    monkeypatch.setattr(measure, "_timed", fail)
    with pytest.raises(SpecError, match="stop"):
        measure.measure(tiny(), ["dense", "pp"], 1, 0, False, no_progress)
    assert {"dense", "pp"} <= set(closed)
