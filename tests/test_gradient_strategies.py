"""LLM-Pruner, LoRAPrune and GISP: their formulas, exactly, and choices that are made in steps."""

import zlib
from typing import Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import GradientScorer, GroupPart, MatrixGradient, SpecError
from prunekit.registry.checks import check_component
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.gisp import Gisp, GispScorer
from prunekit.strategies.llm_pruner import TaylorScorer
from prunekit.strategies.lora_prune import LoRAPruneScorer
from pydantic import ValidationError

from tests.test_gradients import plain

MHA = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def matrices(model, batches, layer=1, kind="mlp"):
    """Weight, gradient and mean squared gradient of a site's matrices, with a row for each channel."""
    whole, squares = plain(model, batches)
    module = "mlp" if kind == "mlp" else "self_attn"
    found = []
    for name in MHA[kind]:
        path = f"model.layers.{layer}.{module}.{name}.weight"
        three = (model.get_parameter(path).detach(), whole[path].detach(), squares[path].detach())
        found.append([tensor.t() if name in ("o_proj", "down_proj") else tensor for tensor in three])
    return found


def scores(model, batches, scorer, layer=1, kind="mlp", **options):
    with prune(model, "llm_pruner", ratio=0.3, calibration=batches, scorer=scorer, **options) as pruned:
        (cut,) = [cut for cut in pruned.cuts if (cut.site.layer, cut.site.kind) == (layer, kind)]
        return pruned.calibrated_scores(cut).units


IMPORTANCE = {
    "first_order": lambda w, g, f: (w * g).abs().sum(1),
    "vector": lambda w, g, f: (w * g).sum(1).abs(),
    "second_order": lambda w, g, f: (w * f * w).abs().sum(1),
    "mixed": lambda w, g, f: (w * g - 0.5 * w * f * w).abs().sum(1),
}
GROUP = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.amax(0),
    "product": lambda rows: rows.prod(0),
    "first": lambda rows: rows[0],
}


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("importance", IMPORTANCE)
def test_llm_pruner_is_its_formula(make_model, batches, importance, kind):
    model, batches = make_model("llama-mha"), batches[:2]
    rows = torch.stack([IMPORTANCE[importance](*each) for each in matrices(model, batches, kind=kind)])
    for group in GROUP if importance == "first_order" else ("sum",):
        expected = GROUP[group](rows)
        expected = expected.view(8, -1).sum(1) if kind == "attention" else expected
        found = scores(model, batches, TaylorScorer(importance=importance, group=group), kind=kind)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_importances_differ(make_model, batches):
    model = make_model("llama-mha")
    found = [scores(model, batches[:2], TaylorScorer(importance=importance)).argsort() for importance in IMPORTANCE]
    assert all(not torch.equal(one, other) for one in found for other in found if one is not other)


def test_under_grouped_queries_rows_of_the_query_heads_are_added():
    site = some_site("attention")
    query, key = torch.rand(6, 8), torch.rand(6, 4)
    parts = [GroupPart("q", query, 0, False), GroupPart("k", key, 0, False), GroupPart("o", query, 0, True)]
    summed = query[:, :4] + query[:, 4:]
    torch.testing.assert_close(TaylorScorer().combine(parts, site), (2 * query.sum(1) + key.sum(1)))
    largest = torch.stack([summed, key, summed]).amax(0).sum(1)
    torch.testing.assert_close(TaylorScorer(group="max").combine(parts, site), largest)
    torch.testing.assert_close(TaylorScorer(group="first").combine(parts, site), query.sum(1))


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_lora_prune_is_its_formula(make_model, batches, kind):
    model, expected = make_model("llama-mha"), 0.0
    for weight, gradient, _ in matrices(model, batches, kind=kind):
        units = (weight * gradient).abs().sum(1).view(8 if kind == "attention" else 192, -1).sum(1)
        expected = expected + units / (units.norm() + 1e-8)
    found = scores(model, batches, LoRAPruneScorer(adapter_rank=None), kind=kind)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("reads", [False, True])
def test_an_adapter_at_its_beginning_shows_the_gradient_so(reads):
    """With B zero the gradient at A is zero; that at B, times A, is what an adapter B A shows of the weight's."""
    torch.manual_seed(0)
    weight, x, target = torch.randn(6, 10), torch.randn(20, 10), torch.randn(20, 6)
    scorer = LoRAPruneScorer(adapter_rank=3, seed=5)

    def loss(weight):
        return (x @ weight.t() - target).square().mean()

    gradient = torch.autograd.functional.jacobian(loss, weight)
    turned = (lambda tensor: tensor.t()) if reads else (lambda tensor: tensor)
    seen = turned(scorer._seen(MatrixGradient("p", turned(weight), turned(gradient), None, reads)))
    generator = torch.Generator().manual_seed(zlib.crc32(b"5 p"))
    a = (torch.rand(3, 10, generator=generator) * 2 - 1).requires_grad_(True)
    b = torch.zeros(6, 3, requires_grad=True)
    at_b, at_a = torch.autograd.grad(loss(weight + b @ a), (b, a))
    assert not at_a.any()
    torch.testing.assert_close(seen, at_b @ a.detach() + b.detach() @ at_a - at_b @ at_a)


def test_adapters_are_seeded(make_model, batches):
    model = make_model("llama-mha")
    first, again, other = (scores(model, batches, LoRAPruneScorer(seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.allclose(first, other, rtol=1e-2)
    assert not torch.allclose(first, scores(model, batches, LoRAPruneScorer(adapter_rank=None)), rtol=1e-2)


def test_gisp_is_its_formula(make_model, batches):
    model = make_model("llama-mha")
    for kind, units, shipped in (("attention", 8, 4 * 16 * 128), ("mlp", 192, 3 * 192)):
        sums, size = torch.zeros(units), 0
        for weight, gradient, _ in matrices(model, batches, kind=kind):
            sums += (weight * gradient).abs().sum(1).view(units, -1).sum(1)
            size += weight.numel() // units
        torch.testing.assert_close(scores(model, batches, GispScorer(), kind=kind), sums / size, rtol=1e-3, atol=0)
        found = scores(model, batches, GispScorer(size="as_shipped"), kind=kind)
        torch.testing.assert_close(found, sums / shipped, rtol=1e-3, atol=0)


# In steps.


def by_hand(model, batches, ratio, steps):
    """GISP on the MLPs of a model, by plain autograd and weights set to zero; returns the kept channels by layer."""
    layers = model.model.layers
    alive = torch.ones(len(layers), 192, dtype=torch.bool)
    for step in range(1, steps + 1):
        whole, _ = plain(model, batches)
        found = torch.zeros(alive.shape)
        for number, layer in enumerate(layers):
            for name in MHA["mlp"]:
                saliency = (
                    layer.mlp.get_submodule(name).weight * whole[f"model.layers.{number}.mlp.{name}.weight"]
                ).abs()
                found[number] += saliency.sum(0 if name == "down_proj" else 1)
        found[~alive] = -1
        count = int(ratio * step / steps * alive.numel())
        alive.view(-1)[found.view(-1).argsort(stable=True)[:count]] = False
        for number, layer in enumerate(layers):
            for name in MHA["mlp"]:
                weight = layer.mlp.get_submodule(name).weight
                (weight.t() if name == "down_proj" else weight)[~alive[number]] = 0
    return [tuple(each.nonzero().flatten().tolist()) for each in alive]


class MlpOnly(GispScorer):
    """GISP's score at MLPs; attention is never cut."""

    name: Literal["mlp_only"] = "mlp_only"

    def combine(self, parts, site):
        return super().combine(parts, site) if site.kind == "mlp" else torch.full((site.units,), 1e9)


def test_each_step_looks_at_the_model_as_cut_so_far(make_model, batches):
    options = dict(allocator={"name": "global_ranking", "ratio_of": "units"}, scorer=MlpOnly())
    model, ratio = make_model("llama-gqa"), 0.5
    units = 3 * (192 + 4)
    with prune(model, "gisp", ratio=ratio, steps=4, calibration=batches, **options) as pruned:
        found = [pruned.sites_kept[layer, "mlp"] for layer in range(3)]
        assert all(len(pruned.sites_kept[layer, "attention"]) == 4 for layer in range(3))
        # what is computed afterwards is the cut that the last step has chosen
        assert pruned.ratio.units_cut > 0.2
    asked = ratio * units / (3 * 192)
    copied = make_model("llama-gqa")
    assert found == by_hand(copied, batches, asked, 4)
    with prune(model, "gisp", ratio=ratio, steps=1, calibration=batches, **options) as pruned:
        assert found != [pruned.sites_kept[layer, "mlp"] for layer in range(3)]


def test_steps_repeat_and_show_one_bar(make_model, batches):
    model, bars = make_model("opt"), []

    def progress(items, label, total):
        done = 0
        for item in items:
            yield item
            done += 1
        bars.append((label, total, done))

    found = []
    for _ in range(2):
        with prune(model, "gisp", ratio=0.4, steps=3, calibration=batches, progress=progress) as pruned:
            found.append(pruned.sites_kept)
    assert found[0] == found[1]
    assert bars == [("gradients, 3 times", 12, 12)] * 2


def test_other_scorers_decide_in_steps_too(make_model, batches):
    """By activations; the means that compensation uses stay those of the dense model."""
    model = make_model("llama-gqa")
    options = dict(ratio=0.5, calibration=batches, scorer="wanda_sp", allocator="uniform")
    with prune(model, "wanda_sp", **{**options, "compensate": "mean"}) as pruned:
        means, once = [cut.history.mean for cut in pruned.cuts], pruned.sites_kept
    with prune(model, "gisp", steps=3, compensate="mean", **options) as pruned:
        assert all(torch.equal(cut.history.mean, mean) for cut, mean in zip(pruned.cuts, means, strict=True))
        assert pruned.sites_kept != once
        assert {len(kept) for (_, kind), kept in pruned.sites_kept.items() if kind == "mlp"} == {96}
    with prune(model, "gisp", steps=3, compensate="least_squares", ratio=0.4, calibration=batches) as pruned:
        assert model(**batches[0]).logits.isfinite().all()


def test_a_ratio_of_nothing_keeps_all(make_model, batches):
    with prune(make_model("llama-gqa"), "gisp", ratio=0.0, calibration=batches[:1]) as pruned:
        assert all(cut.whole for cut in pruned.cuts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequential": True}, "sequential: true, which decides layer by layer"),
        ({"allocator": "sensitivity"}, "allocator sensitivity, which looks at the whole model at once"),
        ({"ratio": None, "allocator": {"name": "explicit", "attention": [0] * 3, "mlp": [0] * 3}}, "takes no ratio"),
        ({"scorer": "ppsp", "selector": "residual_norm", "merger": "probe_only"}, "which decide per batch"),
    ],
)
def test_what_steps_exclude(make_model, batches, options, words):
    with pytest.raises(
        (SpecError, ValidationError), match=f"gisp chooses units in several steps, which excludes.*{words}"
    ):
        prune(make_model("llama-gqa"), "gisp", calibration=batches, **{"ratio": 0.4, **options})
    assert not Gisp(ratio=0.4, steps=1).decides_in_steps


# Contract checks.


class Whole(GradientScorer):
    """Reduces to a matrix."""

    name: Literal["whole"] = "whole"

    def reduce(self, matrix):
        return matrix.weight * matrix.gradient

    def combine(self, parts, site):
        return parts[0].values.sum(1)


class Sum(Whole):
    """Keeps the rules."""

    name: Literal["sum"] = "sum"

    def reduce(self, matrix):
        return super().reduce(matrix).sum(1)


class NotAdditive(Sum):
    """Adds absolute values of parts."""

    name: Literal["not_additive"] = "not_additive"

    @property
    def additive(self):
        return True

    def reduce(self, matrix):
        return super().reduce(matrix).abs()


class Writing(Sum):
    """Writes to its input."""

    name: Literal["writing"] = "writing"

    def reduce(self, matrix):
        return matrix.gradient.mul_(matrix.weight).sum(1)


class Drawing(Sum):
    """Draws without a seed."""

    name: Literal["drawing"] = "drawing"

    def reduce(self, matrix):
        return torch.rand(len(matrix.weight))


class Dividing(Sum):
    """Divides by a gradient of zero."""

    name: Literal["dividing"] = "dividing"

    def reduce(self, matrix):
        return super().reduce(matrix) / matrix.gradient.norm()


class Rows(Sum):
    """Scores rows instead of units."""

    name: Literal["rows"] = "rows"

    def combine(self, parts, site):
        return parts[0].values.flatten()


class ByNumber(Sum):
    """Counts the first rows less."""

    name: Literal["by_number"] = "by_number"

    def reduce(self, matrix):
        found = super().reduce(matrix)
        return found * torch.arange(len(found))


class Old(Sum):
    """A method of another form."""

    name: Literal["old"] = "old"

    def reduce(self, weight, gradient):
        return (weight * gradient).sum(1)


BROKEN = {
    Whole: "must return the reduction as float32",
    NotAdditive: "is additive, and reduces a sum to something else",
    Writing: "changes the weight, gradient or squares it was given",
    Drawing: "reduces the same gradient differently",
    Dividing: "returns the reduction with NaN or infinity for finite input",
    ByNumber: "reduces a row by its number: in another order, rows get other numbers",
    Rows: "must return channel scores as float32",
    Old: r"Old.reduce takes \(self, weight, gradient\); a GradientScorer must have def reduce\(self, matrix\)",
}


@pytest.mark.parametrize(("component", "words"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_named(component, words):
    check_component(Sum)
    with pytest.raises(AssertionError, match=words):
        check_component(component)


@pytest.mark.parametrize("scorer", [*(TaylorScorer(importance=i) for i in IMPORTANCE), LoRAPruneScorer(), GispScorer()])
def test_ours_keep_the_rules(scorer):
    check_component(scorer)
