"""Whole experts go: scores, cuts with the router's rows, and refusals, against own computations."""

import copy

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.registry import ModelError, SpecError

from tests.moe_models import FAMILIES, batches, built, catalog, experts_of, is_supported, logits

COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of a configuration's attribute for the number of experts."""


def cut(model, strategy="reap", **options):
    options = {"ratio": 1 / 3, "calibration": batches(), "catalog": catalog(), **options}
    return prune(model, strategy, **options)


def smaller(model, kept):
    """A stock model of the same family with the experts ``kept``, by (layer, kind); all layers keep as many."""
    count, config = len(next(iter(kept.values()))), copy.deepcopy(model.config)
    for name in COUNTS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, count)
    made = type(model)(config).eval()
    state = model.state_dict()
    for layer, experts in experts_of(model).items():
        units = torch.tensor(kept[layer, "experts"])
        for name, tensor in state.items():
            own = (".experts.", ".gate.", ".router.", "_bias")
            if name.startswith(f"model.layers.{layer}.") and any(part in name for part in own):
                dims = [dim for dim, size in enumerate(tensor.shape) if size == len(experts.down_proj)]
                state[name] = tensor.index_select(dims[0], units) if dims else tensor
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_a_stock_model_with_fewer_experts(family):
    if not is_supported(family):
        pytest.skip(f"this transformers has no {family}")
    model, batch = built(family), batches(1, seed=5)[0]
    ids = batches(1, rows=2, seed=9, padded=False)[0]["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    dense, before = logits(model, batch), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with cut(model) as pruned:
        got, kept, tokens = logits(model, batch), pruned.kept(), model.generate(ids, **options)
        active = pruned.active_parameters()
        assert list(model.state_dict()) == list(before)
    stock = smaller(model, kept)
    want = logits(stock, batch)
    tolerance = 1e-5 * want.abs().max()
    assert (got - want).abs().max() < tolerance
    assert torch.equal(tokens, stock.generate(ids, **options))
    assert active == sum(parameter.numel() for parameter in stock.parameters())
    layer = max(experts_of(model))
    absent = next(n for n in range(6) if n not in kept[layer, "experts"])
    wrong = {**kept, (layer, "experts"): sorted([*kept[layer, "experts"][1:], absent])}
    assert (got - logits(smaller(model, wrong), batch)).abs().max() > 5 * tolerance
    assert (got - dense).abs().max() > 5 * tolerance
    assert torch.equal(logits(model, batch), dense)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_scores_are_those_of_the_papers(family):
    """Over the real tokens: mean of router weight times output norm where routed, and how often the router chooses."""
    model = built(family)
    sums, chosen, total = {}, {}, 0
    for batch in batches():
        calls, handles = {}, []
        for layer, experts in experts_of(model).items():
            take = lambda _, args, layer=layer, calls=calls: calls.__setitem__(layer, args)  # noqa: E731
            handles.append(experts.register_forward_pre_hook(take))
        with torch.no_grad():
            model(**batch, use_cache=False)
            for handle in handles:
                handle.remove()
            real = batch["attention_mask"].bool().reshape(-1)
            total += int(real.sum())
            for layer, (states, index, weights) in calls.items():
                experts = experts_of(model)[layer]
                for number in range(6):
                    for token, place in zip(*torch.where(index == number), strict=True):
                        if real[token]:
                            alone = torch.tensor([[number]]), torch.ones(1, 1)
                            norm = experts(states[token][None], *alone).norm()
                            sums[layer, number] = sums.get((layer, number), 0) + float(weights[token, place] * norm)
                            chosen[layer, number] = chosen.get((layer, number), 0) + 1
    with cut(model) as pruned:
        for site in pruned.cuts:
            want = [sums.get((site.site.layer, n), 0) / chosen.get((site.site.layer, n), 1) for n in range(6)]
            torch.testing.assert_close(pruned.calibrated_scores(site).units, torch.tensor(want), rtol=1e-4, atol=1e-6)
            assert site.fixed.tolist() == torch.tensor(want).topk(site.count).indices.sort().values.tolist()
    with cut(model, "expert_frequency") as pruned:
        for site in pruned.cuts:
            want = [chosen.get((site.site.layer, n), 0) / total for n in range(6)]
            torch.testing.assert_close(pruned.calibrated_scores(site).units, torch.tensor(want))


def test_magnitude_drops_the_experts_with_the_smallest_weights():
    model = built("mixtral")
    with cut(model, "magnitude", experts="whole") as pruned:
        for site in pruned.cuts:
            norms = experts_of(model)[site.site.layer].down_proj.flatten(1).norm(dim=1)
            assert site.fixed.tolist() == norms.topk(4).indices.sort().values.tolist()


def test_ratio_is_a_share_of_the_experts():
    model = built("mixtral")
    with cut(model) as pruned:
        assert {site.kind for site in pruned.sites} == {"experts"}
        assert pruned.ratio.units_cut == pytest.approx(1 / 3, abs=1e-6)
        experts = sum(p.numel() for e in experts_of(model).values() for p in e.parameters())
        routers = sum(m.mlp.gate.weight.numel() for m in model.model.layers)
        assert pruned.ratio.prunable_parameters_cut == pytest.approx(1 / 3, abs=1e-6)
        whole = sum(p.numel() for p in model.parameters())
        assert whole - pruned.active_parameters() == (experts + routers) // 3


def test_refused_by_name():
    model = built("mixtral")
    dense = logits(model, batches(1)[0])
    for options, words in (
        (dict(ratio=0.9), "the router chooses 2 for every token"),
        (dict(applier="zero"), "leaves the router's rows"),
        (dict(compensate="mean"), "works on channels"),
        (dict(selector="spread", merger="importance_scaled"), "a selector"),
        (dict(scorer="wanda_sp"), "one of whole experts"),
        (dict(sequential=True), "sequential"),
        (dict(allocator="sensitivity"), "use uniform"),
    ):
        with pytest.raises(SpecError, match=words):
            cut(model, **options)
    with pytest.raises(ModelError, match="knows none"):
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        )
        cut(transformers.LlamaForCausalLM(config))
    grouped = built("glm4_moe", n_group=2, topk_group=1)
    with pytest.raises(ModelError, match="2 groups"):
        cut(grouped)
    with cut(grouped, "wanda_sp") as pruned:
        assert any(site.expert is not None for site in pruned.sites)
    assert torch.equal(dense, logits(model, batches(1)[0]))


def test_training_goes_through_the_router_that_is_left():
    model = copy.deepcopy(built("mixtral")).requires_grad_(True)
    with cut(model) as pruned:
        batch = batches(1)[0]
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()
        kept = pruned.kept()[0, "experts"]
    gradient = model.model.layers[0].mlp.gate.weight.grad
    gone = [n for n in range(6) if n not in kept]
    assert gradient[list(kept)].abs().sum() > 0 and gradient[gone].abs().sum() == 0
    assert model.model.layers[0].mlp.experts.down_proj.grad[gone].abs().sum() == 0
