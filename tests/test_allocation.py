"""The uniform allocator: the model loses the ratio within one unit, and the scores decide which sites lose one more."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog, SiteScores, SpecError
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.allocation import Uniform, evenly_spread
from transformers import LlamaConfig, LlamaForCausalLM

RATIOS = [0.0, 0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.57, 0.65]


def scores_of(units, kind="attention", values=None):
    """Sites of ``units`` each, with the ``values`` of their units as scores."""
    sites = []
    for layer, number in enumerate(units):
        site = some_site(kind, layer)
        site = type(site)(**{**vars(site), "units": number, "unit_size": 1})
        known = torch.empty(0) if values is None else torch.tensor(values[layer])
        sites.append(SiteScores(site, known, known))
    return sites


@pytest.fixture(scope="module")
def smollm2_sites():
    """The sites of SmolLM2-135M's shapes: 30 layers, 9 heads in 3 key/value groups, 1,536 MLP channels."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return {unit: find_sites(model, Catalog.discover(block=""), unit)[1] for unit in ("kv_group", "query_head")}


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_heads_and_channels_each_reach_the_ratio(smollm2_sites, unit, ratio):
    sites = smollm2_sites[unit]
    counts = Uniform().allocate([SiteScores(site) for site in sites], ratio)
    for kind in ("attention", "mlp"):
        chosen = [(site.units, count) for site, count in zip(sites, counts, strict=True) if site.kind == kind]
        total = sum(units for units, _ in chosen)
        assert abs(sum(units - count for units, count in chosen) - ratio * total) <= 0.5 + 1e-6
        assert all(abs(units - count - ratio * units) < 1 for units, count in chosen)


@pytest.mark.parametrize("ratio", [*RATIOS, 0.9, 0.999])
def test_rounding_down_never_cuts_more_than_asked(ratio):
    for kind in ("attention", "mlp"):
        for units in (1, 2, 7, 24, 100):
            (kept,) = Uniform(rounding="down").allocate(scores_of([units], kind), ratio)
            assert kept > 0
            assert (units - kept) / units <= ratio + 1e-9 < (units - kept + 1) / units + 1e-9


@pytest.mark.parametrize("ratio", RATIOS)
def test_channels_make_up_for_heads_that_are_not_whole(smollm2_sites, ratio):
    sites = smollm2_sites["kv_group"]
    counts = Uniform(rounding="to_channels").allocate([SiteScores(site) for site in sites], ratio)
    pairs = list(zip(sites, counts, strict=True))
    assert {count for site, count in pairs if site.kind == "attention"} == {3 - int(3 * ratio + 1e-9)}
    widths = {count for site, count in pairs if site.kind == "mlp"}
    assert max(widths) - min(widths) <= 1
    lost = sum((site.units - count) * site.unit_parameters for site, count in pairs)
    total = sum(site.units * site.unit_parameters for site in sites)
    assert abs(lost - ratio * total) <= 3 * 576 / 2 + 1  # half a channel


def test_channels_that_cannot_make_up_for_heads_are_refused(smollm2_sites):
    sites = [SiteScores(site) for site in smollm2_sites["kv_group"]]
    with pytest.raises(SpecError, match=r"whole heads make 0\.167 .* the rest of 0\.95; lower the ratio"):
        Uniform(rounding="to_channels").allocate(sites, 0.95)
    with pytest.raises(SpecError, match=r"cannot make up for the rest of 0\.4"):
        Uniform(rounding="to_channels").allocate([each for each in sites if each.site.kind == "attention"], 0.4)
    only_mlps = [each for each in sites if each.site.kind == "mlp"]
    assert Uniform(rounding="to_channels").allocate(only_mlps, 0.4) == Uniform().allocate(only_mlps, 0.4)


@pytest.mark.parametrize("units", [1, 2, 3])
def test_every_site_keeps_a_unit(units):
    assert Uniform().allocate(scores_of([units] * 4), 0.99) == [1] * 4


def test_the_site_whose_next_unit_has_the_smallest_share_loses_one_more():
    values = [[1.0, 1.0, 1.0], [5.0, 1.0, 5.0], [90.0, 0.0, 10.0]]  # shares of the next unit: 1/3, 1/11, and 0
    assert Uniform().allocate(scores_of([3] * 3, values=values), 1 / 9) == [3, 3, 2]
    assert Uniform().allocate(scores_of([3] * 3, values=values), 2 / 9) == [3, 2, 2]
    # One of each site is gone: the second smallest has 1/3, 5/11 and 1/10 of the scores.
    assert Uniform().allocate(scores_of([3] * 3, values=values), 5 / 9) == [1, 2, 1]


def test_larger_remainders_come_before_scores():
    values = [[1.0] * 10, [1.0] * 8 + [0.0]]  # 40% is 4 and 3.6 units
    assert Uniform().allocate(scores_of([10, 9], values=values), 0.4) == [6, 5]
    assert Uniform().allocate(scores_of([8, 9], values=[[0.0] * 8, [1.0] * 9]), 0.4) == [5, 5]  # 3.2 and 3.6: 7


def test_without_scores_the_sites_are_spread_over_depth():
    counts = Uniform().allocate(scores_of([3] * 10), 0.4)
    assert counts == [2, 2, 1, 2, 2, 2, 2, 1, 2, 2] and evenly_spread(2, 10) == [2, 7]
    assert [len(evenly_spread(number, 7)) for number in range(8)] == list(range(8))


def test_widths_are_multiples_and_the_sum_is_nearest():
    counts = Uniform(mlp_multiple=64).allocate(scores_of([1536] * 30, "mlp"), 0.4)
    assert set(counts) == {896, 960} and sum(counts) == 27_648  # 60% of 46,080
    assert Uniform(rounding="down", mlp_multiple=64).allocate(scores_of([1536] * 3, "mlp"), 0.4) == [960] * 3
    assert sorted(Uniform(mlp_multiple=64).allocate(scores_of([100] * 3, "mlp"), 0.2)) == [64, 64, 100]


@pytest.mark.parametrize("skipped", [(), (0, 1)])
@pytest.mark.parametrize("strategy", ["pp", "wanda_sp", "magnitude", "reconstruct"])
def test_all_layers_together_lose_the_ratio(make_model, batches, strategy, skipped):
    model = make_model("llama-gqa", num_hidden_layers=5, num_key_value_heads=2, intermediate_size=96)
    with prune(model, strategy, ratio=0.3, skip_layers=skipped, allocator=Uniform(), calibration=batches) as pruned:
        lost = {"attention": 0, "mlp": 0}
        for site in pruned.sites:
            lost[site.kind] += site.units - pruned.counts[site.layer, site.kind]
        assert lost == {"attention": 3, "mlp": 144}
        assert pruned.notes == () or strategy == "reconstruct"  # about the tokens of its covariances


def test_calibrated_scores_decide_also_for_a_strategy_that_decides_per_batch(make_model, batches):
    def site_losing(strategy, weak, **options):
        model = make_model("llama-gqa", num_hidden_layers=4, num_key_value_heads=2)
        with torch.no_grad():  # one group of the layer contributes next to nothing
            width = model.model.layers[weak].self_attn.o_proj.weight.shape[1] // 2
            model.model.layers[weak].self_attn.o_proj.weight[:, :width] *= 1e-3
        with prune(model, strategy, ratio=0.125, calibration=batches, **options) as pruned:
            return [layer for (layer, kind), count in pruned.counts.items() if kind == "attention" and count == 1]

    for strategy in ("pp", "wanda_sp", "magnitude"):
        assert [site_losing(strategy, weak) for weak in (0, 3)] == [[0], [3]]
    # Layer after layer, the scores of later layers are not known when the counts are fixed.
    assert [site_losing("wanda_sp", weak, sequential=True) for weak in (0, 3)] == [[1], [1]]
