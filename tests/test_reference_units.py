"""Single functions of the reference code of Probe Pruning, as recorded from it, and what ours give for the same input.

Where the reference does something that ours refuses on purpose, the test says which of its cases are left out.
"""

import json
import math

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ChannelHistory, MeanSquare, Producer, Rows, Site, SiteScores, SpecError
from prunekit.strategies.allocation import Uniform
from prunekit.strategies.flap.scorer import FluctuationScorer
from prunekit.strategies.pp.mergers import FixedRatio, ImportanceScaled, ProbeOnly
from prunekit.strategies.pp.scorer import PPsp
from prunekit.strategies.pp.selectors import HiddenNorm, ResidualNorm
from prunekit.strategies.reference.pp import PPReferenceFixedRatio
from prunekit.strategies.reference.pp_flap import PPReferenceFluctuation
from prunekit.strategies.wanda_sp import WandaSpScorer

pytestmark = pytest.mark.smoke

SCORERS = {"ppwandasp": PPsp(), "wandasp": WandaSpScorer(), "flap": FluctuationScorer()}
PAD_EPSILON = 1e-3
EMA_CHANNELS = [0, 3, 4, 9, 15]  # units.json, stats_note


def site(kind: str, units: int, unit_size: int = 1) -> Site:
    producer = Producer("up", (Rows(0, unit_size),))
    return Site(0, kind, "norm", "mlp", (producer,), "down", units, unit_size, unit_parameters=1, outputs=16)


@pytest.fixture
def units(shared):
    return json.loads((shared / "golden" / "units.json").read_text())


@pytest.fixture
def tensors(shared):
    from safetensors.torch import load_file

    return load_file(shared / "golden" / "units.safetensors")


def test_probe_selection(units, tensors):
    """All recorded cases but the two that rank rows before positions, which no selector of ours does."""
    checked = 0
    for case in units["probe"]:
        if case["types"] == ["bszrank", "seqrank"]:
            continue
        shares = dict(zip(case["types"], case["ratios"], strict=True))
        options = {"positions": shares.get("seqrank", 1.0), "rows": shares.get("bszrank", 1.0)}
        selector, states = (ResidualNorm, "residual") if case["residual"] else (HiddenNorm, "x")
        states = tensors[f"probe/{states}"]
        rows, positions = selector(**options).select(states, None, torch.Generator())
        assert rows.tolist() == (case["bsz"] if case["bsz"] is not None else list(range(states.shape[0])))
        assert positions.tolist() == (case["seq"] if case["seq"] is not None else list(range(states.shape[1])))
        checked += 1
    assert checked == 14


PLACES = {"mlp": site("mlp", 16), "attn": site("attention", 2, 8)}


def metric(tensors, kind: str, scorer, merger, padded: bool) -> torch.Tensor:
    """Channel scores as the reference's pad handling has them: padded attention outputs zeroed, those of MLPs not."""
    rows, positions = tensors["metric/bsz"], tensors["metric/seq"]
    real = tensors["metric/pad"][rows][:, positions] == 0
    probe = tensors["metric/probe_out"]
    if padded and kind == "attn":
        probe = probe * real[..., None]
    measured = scorer.statistic.measure(probe, None, None)
    if padded:
        measured *= (len(rows) / (real.sum(0) + PAD_EPSILON))[:, None]
    merged = merger.merge(measured, tensors["metric/hist"][positions], PLACES[kind]).sum(0)
    return scorer.score(scorer.prepare(tensors["metric/W"], PLACES[kind]), merged)


@pytest.mark.parametrize("kind", ["mlp", "attn"])
@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("padded", [0, 1])
@pytest.mark.parametrize("with_history", [0, 1])
def test_metrics(tensors, units, kind, name, padded, with_history):
    label = f"metric/{kind}/{name}/pads{padded}/hist{with_history}"
    if label not in tensors:
        assert units[label].startswith("reference raises")
        return
    merger = ImportanceScaled() if with_history else ProbeOnly()
    scores = metric(tensors, kind, SCORERS[name], merger, bool(padded))
    if (kind, name) == ("attn", "ppwandasp"):  # the others add their heads' channels up when they sort
        scores = SCORERS[name].unit_scores(scores, 8)
    expected = tensors[label]
    expected = expected.sum(0) if expected.dim() == 2 else expected  # flap without history: one score a position
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PLACES)
def test_fixed_ratio(tensors, kind):
    """The reference gives the share to the probe in attention and to history in the MLP."""
    expected = tensors[f"metric/{kind}/ppwandasp/probefixratio0.3"]

    def scores(merger) -> torch.Tensor:
        return PPsp().unit_scores(metric(tensors, kind, PPsp(), merger, padded=False), PLACES[kind].unit_size)

    torch.testing.assert_close(scores(PPReferenceFixedRatio(probe=0.3)), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(scores(FixedRatio(probe=0.3)), expected, rtol=1e-3) is (kind == "attn")


def kept_units(scores: torch.Tensor, place: Site, ratio: float, multiple: int) -> set[int]:
    (count,) = Uniform(rounding="down", mlp_multiple=multiple).allocate([SiteScores(place, scores, scores)], ratio)
    return set(scores.topk(count).indices.tolist())


def test_heads_kept(units, tensors):
    for case in units["sort_attn"]:
        scores = tensors[f"sort_attn/{case['heads']}"]
        kept = kept_units(scores, site("attention", case["heads"]), case["ratio"], 64)
        assert sorted(kept) == case["kept"], case


def test_mlp_channels_kept(units, tensors):
    """Where the reference's rounding asks for more channels than there are, it keeps a few; ours keeps all."""
    out_of_range = 0
    for case in units["sort_mlp"]:
        scores = tensors[f"sort_mlp/{case['I']}"]
        kept = kept_units(scores, site("mlp", case["I"]), case["ratio"], 64)
        wanted = case["I"] - int(case["ratio"] * case["I"])
        if math.ceil(wanted / 64) * 64 > case["I"]:
            assert len(kept) == case["I"], case
            out_of_range += 1
        else:
            assert kept == set(case["kept_in_reference_order"]), case
    assert out_of_range == 3


def dropped(total: int, number: int, multiple: int) -> int:
    (count,) = Uniform(rounding="down", mlp_multiple=multiple).allocate(
        [SiteScores(site("mlp", total))], number / total
    )
    return total - count


def test_kept_width_is_rounded_up_to_a_multiple(units):
    for case in units["nearest_multiple"]:
        ours = dropped(case["total"], case["num_prune"], case["multiple"])
        assert ours == max(case["out"], 0), case  # a negative number of channels is the reference's own


def layers_ratio(make_model, layers: int, ratio: float) -> float:
    """The share that the layers left are cut by, with three layers untouched, read off their 100 MLP channels."""
    sizes = {"hidden_size": 16, "intermediate_size": 100, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = make_model("llama-mha", num_hidden_layers=layers, **sizes)
    with prune(model, "pp_reference_wanda_sp", ratio=ratio, scorer="random", allocator={"mlp_multiple": 1}) as pruned:
        (kept,) = {count for (_, kind), count in pruned.counts.items() if kind == "mlp"}
    return round(1 - kept / 100, 2)


@pytest.mark.parametrize("layers", [6, 12, 32])
def test_ratio_rescaled_for_skipped_layers(units, make_model, layers):
    for case in units["adjust_ratio"]:
        if case["layers"] == layers and case["out"] < 1:
            assert layers_ratio(make_model, layers, case["ratio"]) == case["out"], case
        elif case["layers"] == layers:
            with pytest.raises(SpecError, match="out of reach"):  # the reference would cut these layers whole
                layers_ratio(make_model, layers, case["ratio"])


@pytest.mark.parametrize("padded", [0, 1])
def test_history(tensors, padded):
    """Calibration, then the moving average on kept channels; the first batch is the reference's warm-up: no update."""
    label = f"stats/ppwandasp/pads{padded}"
    history = ChannelHistory(16, torch.device("cpu"))
    for number in range(3):
        MeanSquare().observe(history, tensors[f"{label}/calib{number}"], None)
    torch.testing.assert_close(history.table, tensors[f"{label}/after_calib/scaler_inp"])
    assert history.rows.eq(12).all()
    torch.testing.assert_close(history.table, tensors[f"{label}/after_ema0/scaler_inp"])
    for number in (1, 2):
        x = tensors[f"{label}/ema{number}"]
        observed = MeanSquare().measure(x, None, None)
        if padded:
            real = (tensors["metric/pad"] == 0).sum(0)
            observed = observed * (x.shape[0] / (real + PAD_EPSILON))[:, None]
        columns = torch.tensor(EMA_CHANNELS)
        observed = observed if observed.shape[1] == len(columns) else observed[:, columns]
        table = history.table[: x.shape[1]]
        table.index_copy_(1, columns, ImportanceScaled().update(table[:, columns], observed))
        torch.testing.assert_close(history.table, tensors[f"{label}/after_ema{number}/scaler_inp"])


@pytest.mark.parametrize("padded", [0, 1])
def test_fluctuation_of_the_reference(tensors, padded):
    label = f"stats/flap/pads{padded}"
    history = ChannelHistory(16, torch.device("cpu"))
    for number in range(3):
        PPReferenceFluctuation().observe(history, tensors[f"{label}/calib{number}"], None)
    torch.testing.assert_close(history.table, tensors[f"{label}/after_calib/fluc_inp"])
    torch.testing.assert_close(history.mean, tensors[f"{label}/after_calib/baseline_inp"].mean(0))
    assert history.tokens == tensors[f"{label}/after_calib/nsamples"][0]


# A few of those figures, so that they are compared everywhere: recorded from the same reference (its commit of ICLR
# 2025, single precision), channel 5 of the metric inputs and channel 3, positions 0 and 1, of the statistics.
WEIGHT = [-0.65697, 0.0762, 1.04327, 0.97284, 0.09131, 0.0553, 0.81178, -1.40338]
WEIGHT += [0.67148, 0.58006, -1.03678, -0.19989, -1.51124, 0.37225, -1.34603, -2.13834]
PROBE = [
    [-0.93273, -0.45422, 1.68407, 2.08115, 0.3837],
    [-0.36226, -1.15942, 1.20304, -1.83501, 0.95199],
    [-0.99048, -0.48899, 0.87575, 0.00886, -0.53738],
]
HISTORY = [2.32171, 0.80834, 0.22319, 0.15314, 2.37903]
CALIBRATION = [
    [[1.76152, 0.18539], [0.86376, 1.13905], [0.21353, 1.592], [0.5161, 0.92638]],
    [[0.37487, -0.23091], [1.11757, 0.98492], [-1.39999, 0.97131], [0.56927, -2.55342]],
    [[-0.76779, 1.68344], [-1.1799, -0.48742], [1.18052, -1.57424], [1.86395, 0.10292]],
]
BATCH = [[-0.20837, -0.36028], [-0.80276, 1.04842], [-0.06526, 0.54093]]
BATCH += [[-0.53796, -0.43096], [-1.17793, 0.40578], [0.16696, -0.67373]]


@pytest.mark.parametrize(
    ("name", "merger", "expected"),
    [
        ("ppwandasp", ImportanceScaled(), 53.189),
        ("ppwandasp", ProbeOnly(), 36.4525),
        ("ppwandasp", PPReferenceFixedRatio(probe=0.3), 36.3259),
        ("wandasp", ImportanceScaled(), 38.2215),
        ("wandasp", ProbeOnly(), 31.6417),
        ("flap", ImportanceScaled(), 136.4953),
        ("flap", ProbeOnly(), 94.1395),
    ],
)
def test_recorded_score_of_one_mlp_channel(name, merger, expected):
    scorer = SCORERS[name]
    probe, history = torch.tensor(PROBE)[..., None], torch.tensor(HISTORY)[:, None]
    place = site("mlp", 1)
    merged = merger.merge(scorer.statistic.measure(probe, None, None), history, place).sum(0)
    score = scorer.score(scorer.prepare(torch.tensor(WEIGHT)[:, None], place), merged)
    assert score.item() == pytest.approx(expected, rel=1e-4)


def test_recorded_history_of_one_channel():
    history = ChannelHistory(1, torch.device("cpu"))
    for batch in CALIBRATION:
        MeanSquare().observe(history, torch.tensor(batch)[..., None], None)
    assert history.table.flatten().tolist() == pytest.approx([1.22367, 1.5643], rel=1e-4)
    observed = MeanSquare().measure(torch.tensor(BATCH)[..., None], None, None)
    updated = ImportanceScaled().update(history.table, observed)
    assert updated.flatten().tolist() == pytest.approx([1.21543, 1.55253], rel=1e-4)


@pytest.mark.parametrize(
    ("ratio", "kept"),
    [(0.05, [0, 1, 2, 3, 4, 5, 6, 7]), (0.33, [0, 1, 3, 5, 6, 7]), (0.44, [1, 3, 5, 6, 7]), (0.8, [3, 5])],
)
def test_recorded_heads_kept(ratio, kept):
    scores = torch.tensor([0.31701, 0.82117, 0.10023, 0.95527, 0.0004, 1.63792, 0.50532, 0.67849])
    assert sorted(kept_units(scores, site("attention", 8), ratio, 64)) == kept


@pytest.mark.parametrize(
    ("total", "number", "multiple", "expected"),
    [(256, 65, 64, 64), (256, 63, 64, 0), (256, 99, 8, 96), (704, 10, 8, 8), (100, 65, 8, 60), (100, 63, 64, 36)],
)
def test_recorded_rounding(total, number, multiple, expected):
    assert dropped(total, number, multiple) == expected


@pytest.mark.parametrize(("ratio", "expected"), [(0.1, 0.13), (0.2, 0.27), (0.5, 0.67)])
def test_recorded_ratio_of_nine_of_twelve_layers(make_model, ratio, expected):
    assert layers_ratio(make_model, 12, ratio) == expected
