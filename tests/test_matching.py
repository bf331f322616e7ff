"""A study's strategies at equal cost: the ratio at which a decoder costs what is asked, and what cannot be matched."""

import pytest
import torch
from prunekit.compress import Pipeline, PipelineSpec, prune
from prunekit.compress.ablation.study import Study
from prunekit.compress.ablation.worker import Worker
from prunekit.compress.pruning.matching import NEAR, DecoderCost, Match, nearest
from prunekit.registry import SpecError

# A group of heads is 0.7% of the decoder, so that every ratio has a cost within 0.5%.
MODEL = {"num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96,
         "intermediate_size": 640, "head_dim": 16}  # fmt: skip


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("llama-gqa", **MODEL)


@pytest.fixture
def content(small_pipeline):
    """A pipeline on a small model with three groups of two heads, its cost measured."""

    def make(match, **options):
        data = small_pipeline("llama-gqa", MODEL, **options)
        return {**data, "match": match, "evaluate": [{"name": "cost", "batch_size": 4, "length": 32}]}

    return make


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("pp", {}),
        ("flap", {}),
        ("wanda_sp", {"sequential": True}),
        ("pp", {"attention_unit": "query_head"}),
        ("wanda_sp", {"skip_layers": [0]}),
        ("magnitude", {"allocator": {"rounding": "down"}}),
        ("pp", {"allocator": {"rounding": "to_channels"}}),
    ],
)
@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_the_decoder_loses_the_share_of_its_parameters(model, batches, strategy, options, ratio):
    linears = [each for each in model.model.layers.modules() if isinstance(each, torch.nn.Linear)]
    dense = sum(parameter.numel() for linear in linears for parameter in linear.parameters())
    with prune(model, strategy, ratio=ratio, calibration=batches, match=Match("parameters"), **options) as pruned:
        lost = sum((s.units - pruned.counts[s.layer, s.kind]) * s.unit_parameters for s in pruned.sites)
        found = pruned.ratio
    assert abs(lost / dense - ratio) <= NEAR
    assert found.asked == ratio and found.decoder_parameters_cut == pytest.approx(lost / dense, abs=1e-6)
    assert found.matched.cost == pytest.approx(1 - lost / dense, abs=1e-6)


@pytest.mark.parametrize("options", [{"use": "wanda_sp"}, {"use": "pp", "skip_layers": [0]}])
def test_the_operations_are_those_that_the_evaluator_counts(content, options):
    record = Pipeline(content("flops", **options)).measure().record
    (cost,) = record.metrics
    matched = record.ratio.matched
    assert (matched.what, matched.length, matched.batch_size) == ("flops", 32, 4)
    assert matched.cost == pytest.approx(cost.pruned["decoder_flops_ratio"], abs=1e-5)
    assert abs(matched.cost - 0.6) <= NEAR
    assert (matched.added > 0) == (options["use"] == "pp")
    assert record.ratio.asked == 0.4


def test_a_matched_trial_keeps_its_ratio_and_says_what_it_used(content, tmp_path):
    results = Pipeline(content("parameters", use="pp", attention_unit="query_head")).run(tmp_path / "run")
    ratio = results.record.ratio
    assert ratio.asked == 0.4 < ratio.matched.ratio
    assert (
        f"60.0% of the dense decoder's parameters at a ratio of {ratio.matched.ratio:.4g}"
        in (results.folder / "report.md").read_text()
    )
    again = Pipeline(PipelineSpec.load(results.folder / "resolved.yaml")).measure().record
    assert again.ratio == ratio and again.layers == results.record.layers


def test_what_cannot_be_matched_says_how_near_it_comes(model, batches):
    far = r"match: flap at ratio 0\.9 cannot be matched.*to cost 10% .*parameters, and the nearest is \d\d\.\d%"
    with pytest.raises(SpecError, match=far):
        prune(model, "flap", ratio=0.9, calibration=batches, match=Match("parameters"), allocator={"minimum_units": 3})
    with pytest.raises(SpecError, match=r"magnitude at ratio 0\.4 .*the nearest is .* \(at a ratio of "):
        prune(model, "magnitude", ratio=0.4, match=Match("parameters"), allocator={"mlp_multiple": 640})


def test_a_probe_that_costs_more_than_is_asked_cannot_be_matched(content):
    outcome = Worker().run(PipelineSpec.of(content("flops", use="full_batch_probing")))
    assert outcome.result is None
    assert "match: full_batch_probing at ratio 0.4 cannot be matched" in outcome.error
    assert "of it for probe and compensation" in outcome.error


STUDY = """\
match: {match}
base: {{calibration: {{sequences: 2, length: 32}}, evaluate: [perplexity]{more}}}
vary: {{prune.use: [pp, flap], prune.ratio: [0.2, 0.4]}}
"""


def test_a_study_sets_the_match_of_every_trial(tmp_path):
    path = tmp_path / "study.yaml"
    keys = []
    for match in ("parameters", "flops", "null"):
        path.write_text(STUDY.format(match=match, more=""))
        study = Study.load(path)
        assert {trial.spec.match for trial in study.trials} == {None if match == "null" else match}
        assert [trial.settings["prune.ratio"] for trial in study.trials] == [0.2, 0.4] * 2
        keys += [trial.key for trial in study.trials]
    assert len(set(keys)) == 12 and "match" not in study.trials[0].pipeline


@pytest.mark.parametrize(
    ("match", "more", "message"),
    [
        ("bytes", "", r"line 1: match: "),
        ("flops", ", match: parameters", r"line 1: match: base has a match, too"),
        ("flops", ", prune: {applier: zero}", r"match: flops cannot be matched: applier zero computes all units"),
    ],
)
def test_mistakes_of_the_file_are_found_without_a_model(tmp_path, match, more, message):
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(match=match, more=more))
    with pytest.raises(SpecError, match=message):
        Study.load(path)


def test_an_allocator_without_a_ratio_is_refused(content):
    shares = {"name": "explicit", "attention": [0] * 6, "mlp": [0.5] * 6}
    with pytest.raises(SpecError, match="match: parameters cannot be matched: allocator explicit takes no ratio"):
        PipelineSpec.of(content("parameters", use="magnitude", ratio=None, allocator=shares))


def test_a_ratio_that_costs_what_was_asked_is_not_searched():
    """An allocator may measure the model for every ratio that is tried."""
    cost, match, tried = DecoderCost(1000.0, {(0, "mlp"): (1000, 1.0, 1000.0)}), Match("parameters"), []

    def counts_at(ratio, off=0.0):
        tried.append(ratio)
        return {(0, "mlp"): 1000 - round(1000 * (ratio + off))}

    assert nearest(match, cost, counts_at, 0.4).ratio == 0.4 and tried == [0.4]
    assert nearest(match, cost, lambda ratio: counts_at(ratio, 0.001), 0.4).ratio == pytest.approx(0.399, abs=6e-4)
    assert len(tried) > 10
