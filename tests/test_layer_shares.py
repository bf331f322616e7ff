"""Allocators with a share for every layer: the formulas, the limits, and what they see of the model."""

import math
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.registry import LayerWeight, NonFiniteError, SiteScores, SparsityAllocator, SpecError, WeightStatistic
from prunekit.registry.checks import check_component
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.layers import (
    AlphaPruning,
    InfluenceShares,
    LayerShares,
    LogIncremental,
    OutlierShare,
    Owl,
    TailIndex,
    within,
)

ALL = [LogIncremental(), Owl(), InfluenceShares(), AlphaPruning()]


def places(values, heads=100, channels=1000, layers=None):
    """Both sites of every layer, with ``values`` as all statistics of the layers."""
    found = []
    for layer, value in zip(layers or range(len(values)), values, strict=True):
        for kind, units in (("attention", heads), ("mlp", channels)):
            site = replace(some_site(kind, layer), units=units)
            found.append(SiteScores(site, layer_statistic=value, weight_statistic=value))
    return found


def shares_of(allocator, values, ratio, **sizes):
    """The shares of the layers' channels that an allocator cuts."""
    sites = places(values, **sizes)
    counts = allocator.allocate(sites, ratio)
    return [1 - count / scores.site.units for scores, count in zip(sites, counts, strict=True)][1::2]


def test_log_incremental():
    ratio, n = 0.4, 8
    growth = [math.log(i + 1) / math.log(n) for i in range(n)]
    last = 0.1 + (ratio - 0.1) / (sum(growth) / n)
    expected = [0.1 + (last - 0.1) * each for each in growth]
    assert shares_of(LogIncremental(first=0.25), [0] * n, ratio) == pytest.approx(expected, abs=1e-3)
    assert shares_of(LogIncremental(first=1), [0] * n, ratio) == pytest.approx([ratio] * n)
    assert shares_of(LogIncremental(), [0], ratio) == pytest.approx([ratio])
    # Layers are counted among those that are pruned.
    skipped = shares_of(LogIncremental(), [0] * n, ratio, layers=range(3, 3 + n))
    assert skipped == shares_of(LogIncremental(), [0] * n, ratio)


def test_owl():
    values, ratio, spread = [0.02, 0.05, 0.01, 0.03], 0.5, 0.1
    mapped = [2 * spread * (value - 0.01) / 0.04 for value in values]
    expected = [ratio - (each - sum(mapped) / 4) for each in mapped]
    assert shares_of(Owl(spread=spread), values, ratio) == pytest.approx(expected, abs=1e-3)
    assert shares_of(Owl(), [0.1] * 3, ratio) == pytest.approx([ratio] * 3)


def test_block_influence():
    values, ratio, temperature = [0.3, 0.1, 0.15, 0.2], 0.3, 0.5
    weights = [math.exp(-value / temperature) for value in values]
    expected = [4 * ratio * weight / sum(weights) for weight in weights]
    assert shares_of(InfluenceShares(temperature=temperature), values, ratio) == pytest.approx(expected, abs=1e-3)
    # A limit: the second layer would lose nearly everything, and the others make it up in their proportions.
    weights = [math.exp(-value / 0.05) for value in values]
    rest = 4 * ratio - 0.5
    others = sum(weights) - weights[1]
    expected = [rest * weight / others for weight in weights]
    expected[1] = 0.5
    assert 4 * ratio * weights[1] / sum(weights) > 0.5 > max(expected[0], *expected[2:])
    found = shares_of(InfluenceShares(temperature=0.05, maximum=0.5), values, ratio)
    assert found == pytest.approx(expected, abs=1e-3)


def test_alpha_pruning():
    values, ratio, spread = [3.0, 5.0, 2.0], 0.4, 0.3
    factors = [0.7 + 0.6 * (value - 2) / 3 for value in values]
    expected = [ratio * each / (sum(factors) / 3) for each in factors]
    assert shares_of(AlphaPruning(spread=spread), values, ratio) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("allocator", ALL, ids=lambda allocator: allocator.name)
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.6])
@pytest.mark.parametrize("sizes", [(3, 1536), (9, 100), (32, 11008)])
def test_heads_and_channels_each_lose_the_ratio(allocator, ratio, sizes):
    values = np.random.default_rng(0).exponential(size=30)
    sites = places(values, *sizes)
    counts = allocator.allocate(sites, ratio)
    for start, units in enumerate(sizes):
        kept = counts[start::2]
        assert abs(30 * units - sum(kept) - ratio * 30 * units) <= 0.5 + 1e-6
        assert min(kept) >= 1 and max(kept) <= units
        assert max(units - count for count in kept) <= allocator.maximum * units + 1
    widths = allocator.model_copy(update={"mlp_multiple": 10}).allocate(sites, ratio)[1::2]
    assert all(width % 10 == 0 or width == sizes[1] for width in widths)


def test_shares_within_limits():
    units, most = np.array([10.0, 10, 20]), np.array([0.5, 0.9, 0.9])
    assert within(np.array([0.4, 0.4, 0.4]), units, 0.4, most).tolist() == pytest.approx([0.4] * 3)
    found = within(np.array([0.9, 0.3, 0.2]), units, 0.4, most)
    assert found[0] == 0.5 and found[1] / found[2] == pytest.approx(1.5) and found @ units == pytest.approx(16)
    assert within(np.array([1.0, 0, 0]), units, 0.5, most).tolist() == pytest.approx([0.5] * 3)
    assert within(np.array([-0.2, 0.5, 0.5]), units, 0.3, most).tolist() == pytest.approx([0, 0.4, 0.4])


def test_what_the_limit_does_not_allow_is_refused():
    with pytest.raises(SpecError, match=r"owl: a ratio of 0\.5 is out of reach: with maximum: 0\.4 .* 0\.4 of the att"):
        Owl(maximum=0.4).allocate(places([0.1, 0.2]), 0.5)
    with pytest.raises(SpecError, match=r"can be cut; lower the ratio, or raise maximum$"):
        Owl(maximum=0.4).allocate(places([0.1, 0.2]), 0.5)
    with pytest.raises(SpecError, match=r"0\.6666 of the attention units can be cut; lower the ratio$"):
        Owl().allocate(places([0.1, 0.2], heads=3), 0.7)


@pytest.mark.parametrize("component", [*ALL, Owl(multiple=3), AlphaPruning(tail=0.3)])
def test_they_pass_the_checks(component):
    check_component(component)


def test_outlier_shares_are_counted_over_a_whole_layer():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in ((6, 4), (3, 5))]
    norms = [torch.rand(4, generator=generator), 3 * torch.rand(5, generator=generator)]
    entries = [
        abs(matrix[o, i].item()) * norm[i].item()
        for matrix, norm in zip(matrices, norms, strict=True)
        for o in range(matrix.shape[0])
        for i in range(matrix.shape[1])
    ]
    mean = sum(entries) / len(entries)
    expected = sum(entry > 2 * mean for entry in entries) / len(entries)
    weights = [LayerWeight("a", lambda m=m: m, norm) for m, norm in zip(matrices, norms, strict=True)]
    assert OutlierShare(multiple=2).measure(weights) == expected > 0


def test_the_tail_index_of_a_known_spectrum():
    """Eigenvalues of WᵀW of 16, 8, 4, 2, 1: the tail of three above 2."""
    values = torch.tensor([16.0, 8, 4, 2, 1]).sqrt()
    orthogonal = [torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(n)))[0] for n in (0, 1)]
    matrix = orthogonal[0] @ values.diag() @ orthogonal[1]
    expected = 1 + 3 / (math.log(8) + math.log(4) + math.log(2))
    weight = LayerWeight("a", lambda: matrix)
    assert TailIndex(tail=0.6).measure([weight]) == pytest.approx(expected, rel=1e-4)
    wide = LayerWeight("b", lambda: torch.cat([matrix, torch.zeros(5, 3)], 1))
    assert TailIndex(tail=0.6).measure([weight, wide]) == pytest.approx(expected, rel=1e-4)


class Looking(SparsityAllocator):
    """Keeps everything, and notes what it was given."""

    exempt: ClassVar[dict] = {"check_budget": "it cuts nothing"}

    name: Literal["looking"] = "looking"
    by: WeightStatistic = OutlierShare(multiple=2)
    given: ClassVar[list] = []

    @property
    def weight_statistic(self):
        return self.by

    def allocate(self, sites, ratio):
        self.given[:] = sites
        return [scores.site.units for scores in sites]


def seen(model, batches, by, use="magnitude", **options):
    """What an allocator gets of every layer; the two sites of a layer get the same."""
    with prune(model, use, ratio=0.1, calibration=batches, allocator=Looking(by=by), **options):
        found = {(scores.site.layer, scores.site.kind): scores.weight_statistic for scores in Looking.given}
    assert all(found[layer, "attention"] == found[layer, "mlp"] for layer, _ in found)
    return {layer: value for (layer, _), value in found.items()}


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_outliers_of_a_model(make_model, batches, family):
    """All linear layers of a decoder layer, each with its own inputs; padding does not count."""
    model, mask = make_model(family), torch.arange(24) < torch.tensor([24, 5, 24, 17])[:, None]
    padded = [{"input_ids": batch["input_ids"], "attention_mask": mask.long()} for batch in batches[:2]]
    squares = {}

    def keep(linear, args):
        real = args[0].reshape(4, 24, -1)[mask]
        squares[linear] = squares.get(linear, 0) + real.square().sum(0)

    layers = model.get_decoder().layers
    linears = [[each for each in layer.modules() if isinstance(each, torch.nn.Linear)] for layer in layers]
    handles = [linear.register_forward_pre_hook(keep) for layer in linears for linear in layer]
    for batch in padded:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    found = seen(model, padded, OutlierShare(multiple=2))
    assert sorted(found) == [0, 1, 2] and len(linears[0]) == (7 if family == "llama-gqa" else 6)
    for layer, value in found.items():
        entries = torch.cat([(each.weight.abs() * squares[each].sqrt()).flatten() for each in linears[layer]])
        assert value == pytest.approx(float((entries > 2 * entries.mean()).float().mean()), abs=1e-4)
    assert not any(module._forward_pre_hooks for layer in linears for module in layer)


def test_weights_alone_need_no_text_and_what_is_measured_is_shared(make_counting, batches, tmp_path):
    model, shared = make_counting(), SharedStatistics()
    with prune(model, "magnitude", ratio=0.4, allocator="alpha_pruning") as pruned:
        assert pruned.ratio.units_cut == pytest.approx(0.4, abs=0.05) and model.passes == 0
    with pytest.raises(Exception, match="looks at activations: give it calibration batches"):
        prune(model, "magnitude", ratio=0.4, allocator="owl")
    found = seen(model, batches, OutlierShare(), statistics=shared)
    passes = model.passes
    assert passes == len(batches)  # the score needs no channels calibrated
    assert seen(model, batches, OutlierShare(), statistics=shared) == found and model.passes == passes
    assert seen(model, batches, OutlierShare(multiple=2), statistics=shared) != found
    file = tmp_path / "statistics.safetensors"
    assert seen(model, batches, OutlierShare(), statistics=file) == found
    passes = model.passes
    assert seen(model, batches, OutlierShare(), skip_layers=[0], statistics=file).items() <= found.items()
    assert model.passes == passes


@pytest.mark.parametrize("allocator", [allocator.name for allocator in ALL])
@pytest.mark.parametrize(
    ("use", "options"),
    [
        ("wanda_sp", {}),
        ("pp", {}),
        ("reconstruct", {"skip_layers": [1]}),
        ("magnitude", {"attention_unit": "query_head"}),
    ],
    ids=["static", "per batch", "layer by layer", "query heads"],
)
def test_they_allocate_for_models(make_model, batches, allocator, use, options):
    model = make_model("llama-gqa", num_hidden_layers=4)
    with prune(model, use, ratio=0.4, calibration=batches, allocator=allocator, **options) as pruned:
        assert pruned.ratio.units_cut == pytest.approx(0.4, abs=0.04)
        widths = [count for (_, kind), count in pruned.counts.items() if kind == "mlp"]
        assert len(set(widths)) > 1
        assert model(**batches[0]).logits.isfinite().all()


class NotFinite(WeightStatistic):
    """Has no number."""

    name: Literal["not_finite"] = "not_finite"

    def measure(self, weights):
        return math.nan


class Writing(WeightStatistic):
    """Writes into what it is given."""

    name: Literal["writing"] = "writing"

    def measure(self, weights):
        return float(weights[0].read().abs_().sum())


class WritingNorms(OutlierShare):
    """Writes into the norms of what enters the weights."""

    name: Literal["writing_norms"] = "writing_norms"

    def measure(self, weights):
        weights[0].norms.clamp_(max=0.1)
        return float(len(weights))


class NoStatistic(Looking):
    """Has a number for a statistic."""

    name: Literal["no_statistic"] = "no_statistic"

    @property
    def weight_statistic(self):
        return 0.5


class Counting(WeightStatistic):
    """Differs from call to call."""

    name: Literal["counting"] = "counting"
    calls: ClassVar[list] = []

    def measure(self, weights):
        self.calls.append(1)
        return float(len(self.calls))


def test_the_check_of_weight_statistics_and_what_is_not_finite(make_model, batches):
    check_component(Looking())
    for broken, message in (
        (NotFinite(), "a finite number, found nan"),
        (Writing(), "changes the weights"),
        (WritingNorms(), "changes the norms"),
        (Counting(), "measures the same weights differently"),
    ):
        with pytest.raises(AssertionError, match=message):
            check_component(Looking(by=broken))
    with pytest.raises(AssertionError, match=r"must have a WeightStatistic or None, found 0\.5"):
        check_component(NoStatistic())
    with pytest.raises(NonFiniteError, match="layer 0: not_finite of the weights of this layer is NaN"):
        seen(make_model("llama-gqa"), batches, NotFinite())


def test_an_allocator_from_outside_has_one_formula(make_model, batches):
    class Inverse(LayerShares):
        """In proportion to the inverse of the statistic."""

        name: Literal["inverse"] = "inverse"

        @property
        def weight_statistic(self):
            return TailIndex()

        def shares(self, layers, ratio):
            parts = np.array([1 / scores.weight_statistic for scores in layers])
            return ratio * parts / parts.mean()

    check_component(Inverse())
    with prune(make_model("llama-gqa"), "magnitude", ratio=0.4, allocator=Inverse()) as pruned:
        assert pruned.ratio.units_cut == pytest.approx(0.4, abs=0.05)
