"""Compensation against what must come out: dropped channels that the kept ones determine, and a float64 reference."""

from typing import Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog, Scorer

RATIO = 0.25
GROUPED = ["llama-gqa", "mistral", "qwen2", "qwen3"]
CASES = [(family, "kv_group") for family in ["llama-mha", "opt", *GROUPED]] + [(f, "query_head") for f in GROUPED]
"""Where every query head has key and value of its own, both units are the same."""
CASES_NEED = {"query_head": {"num_key_value_heads": 2}}
"""A group then keeps query heads of which the dropped ones can be copies."""
SOLVE = {"name": "least_squares", "ridge": 1e-7}
RESTORED, CONTROL = 3e-4, 0.1
BIASED = dict(attention_bias=True, mlp_bias=True)
"""Options of LLaMA with which its producers and consumers have biases."""


class LastGo(Scorer):
    """The last units go, whatever they do."""

    name: Literal["last_go"] = "last_go"

    def prepare(self, weight, site):
        return -torch.arange(weight.shape[1], dtype=torch.float32)

    def score(self, prepared, statistic):
        return prepared


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def fresh_ids():
    """Text that calibration has not seen."""
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def sites_of(model, unit="kv_group"):
    return find_sites(model, Catalog.discover(), unit)[1]


def parts(model, site):
    """For every producer its name, and a function of units that gives where their rows are; with its module."""
    for producer in site.producers:
        yield producer.path.rpartition(".")[2], model.get_submodule(producer.path), producer.rows


def dropped_units(site):
    return range(site.units - int(RATIO * site.units), site.units)


def copy_rows(module, to, of):
    module.weight[to] = module.weight[of]
    if module.bias is not None:
        module.bias[to] = module.bias[of]


def one(unit):
    return torch.tensor([unit])


@torch.no_grad()
def plant_combinations(model, unit):
    """Make the last quarter of every site's units linear in the others, or affine where producers have biases.

    Attention: a dropped unit attends as units 0 and 1 do, and its values mix theirs; a query head that has no values of
    its own attends as its neighbour does. MLP: pairs of kept channels share a gate, and a dropped channel with that
    gate mixes them; without a gate (ReLU) it is a positive multiple of another.
    """
    draw = torch.Generator().manual_seed(3)
    for site in sites_of(model, unit):
        for number, unit_index in enumerate(dropped_units(site)):
            first, second, last = (one(u) for u in (2 * number, 2 * number + 1, unit_index))
            named = {name: (module, rows) for name, module, rows in parts(model, site)}
            if site.kind == "mlp" and "gate_proj" in named:
                for to in (second, last):
                    copy_rows(named["gate_proj"][0], to, first)
                up = named["up_proj"][0]
                up.weight[last] = 0.8 * up.weight[first] - 0.7 * up.weight[second]
            elif site.kind == "mlp":
                fc1 = named["fc1"][0]
                fc1.bias[first] = fc1.bias[first].abs() + 1  # a channel that is never active cannot be learnt from
                fc1.weight[last], fc1.bias[last] = 1.7 * fc1.weight[first], 1.7 * fc1.bias[first]
            elif "v_proj" not in named:
                q, rows = named["q_proj"]
                copy_rows(q, rows(last), rows(one(site.units // 2)))
            else:
                for name in ("q_proj", "k_proj"):
                    module, rows = named[name]
                    for to in (second, last):
                        copy_rows(module, rows(to), rows(one(0)))
                    copy_rows(module, rows(first), rows(one(0)))
                v, rows = named["v_proj"]
                size = len(rows(last))
                mixing = torch.randn(2, size, size, generator=draw) / size**0.5
                v.weight[rows(last)] = mixing[0] @ v.weight[rows(first)] + mixing[1] @ v.weight[rows(second)]


@torch.no_grad()
def plant_constants(model):
    """Make the last quarter of every site's units the same for every token: zero, where producers have no biases."""
    for site in sites_of(model):
        gone = torch.tensor(list(dropped_units(site)))
        for name, module, rows in parts(model, site):
            if name in ("v_proj", "gate_proj", "up_proj", "fc1"):
                module.weight[rows(gone)] = 0
                if module.bias is not None:
                    module.bias[rows(gone)] = module.bias[rows(gone)].abs() + 1


def errors(model, ids, strategy, compensators, **options):
    """How far the pruned logits are from the dense ones, by compensator, relative to the largest."""
    dense = logits(model, ids)
    found = {}
    for compensate in compensators:
        with prune(model, strategy, scorer=LastGo(), ratio=RATIO, compensate=compensate, **options) as pruned:
            assert all(count < site.units for count, site in zip(pruned.counts.values(), pruned.sites, strict=True))
            found[str(compensate)] = float((logits(model, ids) - dense).abs().max() / dense.abs().max())
    return list(found.values())


@pytest.mark.parametrize("family, unit", CASES)
def test_channels_that_the_kept_ones_determine_are_restored(make_model, batches, family, unit):
    model = make_model(family, **CASES_NEED.get(unit, {}))
    plant_combinations(model, unit)
    none, mean, solved = errors(
        model, fresh_ids(), "wanda_sp", ["none", "mean", SOLVE], calibration=batches, attention_unit=unit
    )
    assert min(none, mean) > CONTROL
    assert solved < RESTORED


@pytest.mark.parametrize("per_batch", ["pivot", "solve", "usual"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_they_are_restored_where_every_batch_decides(make_model, batches, family, per_batch):
    model = make_model(family)
    plant_combinations(model, "kv_group")
    compensators = ["mean", {**SOLVE, "per_batch": per_batch}]
    mean, solved = errors(model, fresh_ids(), "pp", compensators, calibration=batches)
    assert mean > CONTROL
    assert solved < 3 * RESTORED  # the base's inverse is less exact than a solution


@pytest.mark.parametrize("family, options", [("opt", {}), ("llama-gqa", BIASED), ("qwen2", {})])
@pytest.mark.parametrize("strategy", ["wanda_sp", "pp"])
def test_channels_that_never_change_need_their_mean_alone(make_model, batches, family, options, strategy):
    model = make_model(family, **options)
    plant_constants(model)
    kinds = ("mean", "least_squares", "probe_mean", {"name": "probe_mean", "probe": 1.0})
    compensators = ["none", *kinds]
    none, *restored = errors(model, fresh_ids(), strategy, compensators, calibration=batches)
    assert none > CONTROL
    assert max(restored) < 1e-5


def inputs_of_consumers(model, batches, sites):
    """What enters every consumer of the unpruned model at the real tokens, (tokens, C) float64, by its path."""
    seen = {site.consumer: [] for site in sites}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda module, args, path=path: seen[path].append(args[0]))
        for path in seen
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    valid = torch.cat([batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten() for batch in batches])
    return {
        path: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs])[valid.bool()].double() for path, xs in seen.items()
    }


def reference(x, consumer, kept, ridge):
    """Weight and bias that a cut to the channels kept (k,) should have, in float64; ridge None: mean only."""
    weight, mean = consumer.weight.double(), x.mean(0)
    dropped = torch.tensor([c for c in range(x.shape[1]) if c not in set(kept.tolist())])
    new = weight[:, kept]
    if ridge is not None:
        covariance = (x - mean).T @ (x - mean) / len(x)
        inside = covariance[kept][:, kept] + ridge * covariance.diagonal().mean() * torch.eye(len(kept)).double()
        new = new + weight[:, dropped] @ torch.linalg.solve(inside, covariance[kept][:, dropped]).T
    own = 0 if consumer.bias is None else consumer.bias.double()
    return new, own + weight @ mean - new @ mean[kept]


@pytest.mark.parametrize("compensate, ridge", [
    ("mean", None),
    ({"name": "least_squares", "ridge": 1.0}, 1.0),
    ({"name": "least_squares", "ridge": 0.01}, 0.01),
    ({"name": "low_rank_least_squares", "rank": 192, "ridge": 0.1}, 0.1),
])  # fmt: skip
@pytest.mark.parametrize("family, options", [("opt", {}), ("llama-gqa", {}), ("llama-mha", BIASED)])
def test_the_fold_is_that_of_float64(make_model, batches, family, options, compensate, ridge):
    """Padded tokens of the calibration text included: they do not count."""
    model = make_model(family, **options)
    mask = torch.ones_like(batches[0]["input_ids"])
    mask[1, -9:] = 0
    text = [{**batches[0], "attention_mask": mask}, *batches[1:3]]
    sites = sites_of(model)
    x = inputs_of_consumers(model, text, sites)
    with prune(model, "flap", ratio=0.4, calibration=text, compensate=compensate) as pruned:
        cuts = [cut for cut in pruned._engine.cuts if not cut.whole]
        assert {cut.site.kind for cut in cuts} == {"attention", "mlp"}
        for cut in cuts:
            weight, bias = cut.consumer_weights()
            expected = reference(x[cut.site.consumer], cut.binding.consumer, cut.site.columns(cut.fixed), ridge)
            for found, right in zip((weight, bias), expected, strict=True):
                assert (found.double() - right).norm() < 1e-4 * right.norm()
