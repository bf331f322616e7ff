"""Mixtures of experts from pipeline files: costs, reports, refusals of exports, and results that are read again."""

import json

import pytest
import torch
import transformers
from prunekit.compress import Pipeline, PipelineSpec, prune
from prunekit.compress.bundled import MODEL
from prunekit.compress.output.records import LayerCut
from prunekit.registry import SpecError

from tests.moe_models import batches, built, catalog

PERPLEXITY = {"name": "perplexity", "window": 32, "limit": 4, "batch_size": 2}
COST = {"name": "cost", "length": 16, "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    built("qwen3_moe", vocab_size=4096).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return path


@pytest.fixture
def content(folder):
    def make(**prune):
        return {
            "model": {"name": str(folder), "device": "cpu"},
            "calibration": {"sequences": 4, "length": 32},
            "prune": prune,
            "evaluate": [PERPLEXITY, COST],
        }

    return make


@pytest.mark.parametrize("use", ["reap", "expert_frequency", "wanda_sp", "pp"])
def test_run(content, tmp_path, use):
    more = {"skip_layers": []} if use == "pp" else {}
    ratio = 0.25 if use == "wanda_sp" else 1 / 3
    results = Pipeline(content(use=use, ratio=ratio, **more)).run(tmp_path / "run")
    data = json.loads((results.folder / "results.json").read_text())
    perplexity, cost = data["metrics"]
    assert perplexity["dense"]["perplexity"] != perplexity["pruned"]["perplexity"]
    whole = use in ("reap", "expert_frequency")
    report = (results.folder / "report.md").read_text()
    layer = data["layers"][0]
    if whole:
        assert layer["experts"] == {"kept": 4, "units": 6}
        assert "| 4 of 6" in report and "| experts" in report
        experts = 2 * 6 * 3 * 24 * 32 + 2 * 6 * 32
        assert cost["dense"]["parameters"] - cost["pruned"]["parameters"] == experts / 3
        assert cost["pruned"]["flops_ratio"] == pytest.approx(1, abs=0.01)
    else:
        assert len(layer["expert_channels"]) == 6
        assert "channels of each expert" in report
        assert cost["pruned"]["flops_ratio"] < 1 or use == "pp"
    read = LayerCut.model_validate(layer)
    assert read.sites["experts" if whole else "expert5"].kept == (4 if whole else layer["expert_channels"][5]["kept"])
    again = Pipeline(PipelineSpec.load(results.folder / "resolved.yaml")).run(tmp_path / "again")
    assert again.metrics["perplexity.perplexity"] == results.metrics["perplexity.perplexity"]


def test_recovery_after_whole_experts_have_gone(content, tmp_path):
    """Attention is trained, and the experts that stay keep their weights, which are one tensor."""
    made = {**content(use="reap", ratio=1 / 3), "recover": {"steps": 2, "batch_size": 2, "length": 32}}
    pytest.importorskip("peft", reason="recovery needs peft: pip install peft")
    results = Pipeline(made).run(tmp_path / "run")
    assert set(results.record.recovery.layers) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    uneven = {**made, "prune": {"use": "reap", "ratio": 1 / 3, "skip_layers": [0]}}
    with pytest.raises(SpecError, match=r"recover: .* layer 1 keeps 2 experts, layer 0 6 .*nearest: prune all layers"):
        Pipeline(uneven).run(tmp_path / "uneven")


def test_flops_of_a_cut_are_those_of_the_tokens_that_reach_it(content, tmp_path):
    """A token reaches 2 of 6 experts: what is counted agrees with what a smaller model would take."""
    results = Pipeline(content(use="magnitude", ratio=0.5, attention_unit="kv_group")).run(tmp_path / "run")
    cost, sliced = (results.metrics[f"cost.{name}"]["pruned"] for name in ("flops_ratio", "floor_ratio"))
    assert cost < 0.97
    assert 1 - cost == pytest.approx(1 - sliced, rel=0.05)


@pytest.mark.parametrize("what", ["parameters", "flops"])
def test_a_cost_can_be_matched(what):
    model = built("qwen3_moe")
    from prunekit.compress.pruning.matching import Match

    match = Match(what, 16, 2) if what == "flops" else Match(what)
    with prune(model, "wanda_sp", ratio=0.3, calibration=batches(), catalog=catalog(), match=match) as pruned:
        assert pruned.matched.cost == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("merger", ["importance_scaled", "probe_only"])
@pytest.mark.parametrize("how", ["mean-score", "last"])
def test_freezing_cuts_experts_that_no_token_reaches_as_all_others(how, merger):
    """One token reaches 2 of 6 experts."""
    options = dict(ratio=1 / 3, skip_layers=[], calibration=batches(), catalog=catalog(), merger=merger)
    with prune(built("qwen3_moe"), "pp", **options) as pruned:
        pruned.freeze(how, [torch.tensor([[5]])])
        assert {place: len(kept) for place, kept in pruned.sites_kept.items()} == pruned.counts
        assert any(count < 24 for (_, kind), count in pruned.counts.items() if kind.startswith("expert"))


def test_a_share_of_the_decoder_goes_with_whole_experts(content, tmp_path):
    results = Pipeline(content(use="reap", ratio=0.207, of="decoder")).run(tmp_path / "run")
    ratio = json.loads((results.folder / "results.json").read_text())["ratio"]
    assert ratio["decoder_parameters_cut"] == pytest.approx(0.207, abs=0.005)
    assert ratio["left_whole"] == "all but routed experts"
    with pytest.raises(SpecError, match=r"of them are in blocks that can be cut; left whole: all but routed experts"):
        Pipeline(content(use="reap", ratio=0.9, of="decoder")).run(tmp_path / "high")


def test_cost_tells_attention_from_the_rest_where_whole_experts_go(content, tmp_path):
    found = [Pipeline(content(use=use, ratio=1 / 3)).run(tmp_path / use) for use in ("reap", "wanda_sp")]
    for part in ("attention_projections", "attention_scores", "mlp", "head"):
        whole, channels = (each.metrics[f"cost.{part}"]["dense"] for each in found)
        assert whole == channels > 0, part
