"""What formats ask of the counts: met before pruning, announced, and refused with the nearest that can be had."""

import pytest
import torch
from prunekit.compress import Exporter, PipelineSpec, prune
from prunekit.compress.export.constraint import Constraint, rounding, sentence
from prunekit.compress.export.profiles import PROFILES, TOOLS, profile_named
from prunekit.compress.export.writing import write_model
from prunekit.compress.models.loading import load
from prunekit.compress.pruning.matching import Match
from prunekit.registry import ModelError, SpecError
from prunekit.strategies.wanda_sp import WandaSp


@pytest.fixture
def export(small_pipeline, tmp_path):
    """Exports a small model and returns the manifest; nothing may be left where that fails."""

    def run(family: str = "llama-gqa", profile: str = "hf-uniform", model=None, options=None, **strategy):
        spec = PipelineSpec.of(small_pipeline(family, model, **{"use": "wanda_sp", **strategy}))
        folder = tmp_path / f"out-{profile}"
        try:
            return Exporter(spec, profile, folder, **(options or {})).export()
        except BaseException:
            assert not folder.exists()
            assert not list(tmp_path.glob(".*partial*"))
            raise

    return run


def test_equal_counts_and_multiples_are_met_before_pruning(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "flap", ratio=0.4, calibration=batches) as pruned:
        asked, strategy = pruned.counts, pruned.strategy
    assert len({count for (_, kind), count in asked.items() if kind == "mlp"}) > 1
    with prune(model, Constraint(equal=True, multiple=32).on(strategy), calibration=batches) as pruned:
        counts, found = pruned.counts, rounding(pruned)
    for kind in ("attention", "mlp"):
        mean = sum(count for (_, k), count in asked.items() if k == kind) / 3
        equal = {count for (_, k), count in counts.items() if k == kind}
        assert len(equal) == 1
        assert abs(equal.pop() - mean) <= (16.5 if kind == "mlp" else 0.5)
    assert all(count % 32 == 0 for (_, kind), count in counts.items() if kind == "mlp")
    units = {"attention": 4, "mlp": 192}
    achieved = sum(1 - count / units[kind] for (_, kind), count in counts.items()) / len(counts)
    assert found.achieved.units_cut == pytest.approx(achieved, abs=1e-6)
    assert found.sites_changed == sum(asked[place] != counts[place] for place in counts)


def test_what_was_asked_is_asked_at_the_ratio_that_matches_the_cost(make_model, batches):
    model = make_model("opt")
    strategy = WandaSp(ratio=0.3)
    match = Match("flops", length=24, batch_size=4)
    with prune(model, Constraint(multiple=2).on(strategy), calibration=batches, match=match) as pruned:
        found, own = rounding(pruned), pruned.matched.ratio
    assert abs(own - 0.3) > 0.002
    with prune(model, strategy.model_copy(update={"ratio": own}), calibration=batches) as pruned:
        cut = [1 - pruned.counts.get((s.layer, s.kind), s.units) / s.units for s in pruned.all_sites]
    assert found.asked.units_cut == pytest.approx(sum(cut) / len(cut), abs=1e-6)


def test_the_cost_in_score_is_the_share_of_the_strategys_own_scores(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "wanda_sp", ratio=0.3, calibration=batches) as pruned:
        strategy, before = pruned.strategy, pruned.counts
    with prune(model, Constraint(multiple=64).on(strategy), calibration=batches) as pruned:
        found = rounding(pruned)
        shares = {"asked": [], "achieved": []}
        for cut in pruned.cuts:
            units = pruned._engine.decider.scores(cut).units
            asked = before[cut.site.layer, cut.site.kind]
            for key, count in (("asked", asked), ("achieved", cut.count)):
                shares[key].append(float(units.topk(count).values.sum() / units.sum()))
    for key, values in shares.items():
        assert getattr(found, key).score_kept == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert found.achieved.score_kept != found.asked.score_kept
    text = sentence(found, 0.3)
    assert "a multiple of 64" in text and "30% of the units asked" in text and "of the score kept instead of" in text


def test_widths_go_to_the_nearest_multiple_and_whole_sites_stay_whole(make_model, batches):
    model = make_model("llama-gqa", intermediate_size=100)
    strategies = {"mlp": [0, 0.5, 0.99], "attention": [0, 0, 0]}
    with prune(model, "wanda_sp", ratio=None, calibration=batches, allocator={"name": "explicit", **strategies}) as p:
        strategy = p.strategy
    with prune(model, Constraint(multiple=32).on(strategy), calibration=batches) as pruned:
        assert [pruned.counts[layer, "mlp"] for layer in range(3)] == [100, 64, 32]


@pytest.mark.parametrize("allocator", ["owl", "alpha_pruning", "block_influence"])
def test_rounded_counts_see_what_their_allocator_sees(make_model, batches, allocator):
    model = make_model("llama-gqa")
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches, allocator=allocator) as pruned:
        strategy, asked = pruned.strategy, pruned.counts
    with prune(model, Constraint(multiple=32).on(strategy), calibration=batches) as pruned:
        counts, found = pruned.counts, rounding(pruned)
    assert len({count for (_, kind), count in asked.items() if kind == "mlp"}) > 1
    for (layer, kind), count in counts.items():
        before = asked[layer, kind]
        assert count == (before if kind == "attention" else max(32, (before + 16) // 32 * 32))
    assert found.sites_changed == sum(asked[place] != counts[place] for place in counts)


def test_what_is_asked_stands_in_the_list():
    assert [profile.name for profile in PROFILES] == ["hf-uniform", "hf-hetero", "gguf", "padded", "dynamic"]
    assert all(len(profile.runs) == len(TOOLS) for profile in PROFILES)
    with pytest.raises(SpecError, match=r"no profile 'hf-hetro'.*hf-hetero"):
        profile_named("hf-hetro")


@pytest.mark.parametrize(
    ("case", "error"),
    [
        (dict(skip_layers=[0]), r"skip_layers \[0\] leaves some as they are.*--set prune.skip_layers=\[\].*hf-hetero"),
        (dict(profile="gguf", options={"multiple": 48}), r"--multiple: profile gguf takes multiples of 32, found 48"),
        (dict(options={"multiple": 512}), r"--multiple 512: layer 0 mlp has 192 channels"),
        (dict(profile="padded", options={"multiple": 8}), r"--multiple: profile padded keeps all widths"),
        (dict(use="pp"), r"strategy pp looks at every batch.*--freeze \(mean-score.*--profile dynamic"),
        (dict(use="pp", profile="dynamic", options={"freeze": "last"}), r"--freeze: profile dynamic goes on deciding"),
        (dict(options={"freeze": "last"}), r"--freeze: strategy wanda_sp decides once anyway"),
        (dict(use="pp", options={"freeze": "middle"}), r"freeze: unknown way 'middle'"),
        (dict(family="opt"), r"heads.*nearest: --profile hf-hetero; or cut MLPs alone.*attention: \[0, 0, 0\]"),
        (dict(family="opt", profile="gguf"), r"profile gguf: .*opt"),
        (dict(family="qwen3", profile="gguf"), r"profile gguf: .*qwen3"),
        (dict(family="qwen3", compensate="mean"), r"Qwen3 has no place for the biases.*nearest: --profile hf-hetero"),
        (
            dict(family="mistral", compensate="mean", profile="padded"),
            r"no place for one; nearest: --profile hf-hetero",
        ),
        (
            dict(profile="hf-hetero", attention_unit="query_head"),
            r"query heads .*left for the 4 key/value heads.*Nearest: --set prune.attention_unit=kv_group",
        ),
        (
            dict(family="mistral", model={"sliding_window": 16}, compensate="mean"),
            r"mistral with a sliding window has no other class, and these biases need one",
        ),
        (dict(options={"shard_size": "much"}), r"--shard-size: 'much' is not a size"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(case, error, export):
    with pytest.raises((SpecError, ModelError), match=error):
        export(**case)


def test_what_counts_alone_can_tell_is_told_before_calibration(export, monkeypatch):
    def calibrating(*args, **kwargs):
        raise AssertionError("calibrated first")

    monkeypatch.setattr("prunekit.compress.export.exporting.prune_as_asked", calibrating)
    for case in (dict(family="opt"), dict(profile="hf-hetero", attention_unit="query_head", ratio=0.3)):
        with pytest.raises(SpecError):
            export(**case)


def test_query_heads_cut_evenly_have_a_place(make_model, make_tokenizer, batches, tmp_path):
    """Where every key/value head happens to keep as many query heads, the cut is an ordinary model."""
    model = make_model("llama-gqa")
    with prune(model, "random", ratio=0.5, attention_unit="query_head") as pruned:
        for cut in pruned.cuts:
            if cut.site.kind == "attention":
                cut.close()
                cut.state.fix(torch.tensor([0, 3, 5, 6]))
                cut.open(cut.fixed, stays=True)
        expected = model(batches[0]["input_ids"]).logits
        write_model(profile_named("hf-hetero"), pruned, make_tokenizer(), tmp_path)
    from prunekit.compress.models.source import ModelSource

    again = load(ModelSource(name=str(tmp_path), device="cpu")).model
    assert again.config.per_layer_config[1].num_attention_heads == 4
    assert (again(batches[0]["input_ids"]).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize("profile", ["padded", "dynamic"])
def test_uneven_query_heads_are_kept_where_that_works(profile, export):
    assert export(profile=profile, attention_unit="query_head").check.largest_difference < 1e-4


def test_freezing_says_what_it_costs(export):
    manifest = export(use="pp", profile="hf-hetero", options={"freeze": "calibration"})
    (metric,) = manifest.metrics
    perplexities = [values["perplexity"] for values in (metric.dense, metric.per_batch, metric.exported)]
    assert len(set(perplexities)) == 3
    assert manifest.freeze.how == "calibration"
