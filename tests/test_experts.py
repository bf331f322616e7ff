"""Channels inside routed experts: cuts, statistics by routed token, and PP, against own computations."""

import copy

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators.cost import Cost, operations
from prunekit.registry import DataError, ModelError, SpecError

from tests.moe_models import FAMILIES, batches, built, catalog, columns, experts_of, is_supported, logits, zeroed


def cut(model, strategy="wanda_sp", **options):
    options = {"ratio": 0.4, "calibration": batches(), "catalog": catalog(), **options}
    return prune(model, strategy, **options)


def close(got, want):
    return (got - want).abs().max() / want.abs().max()


def channels_of(experts, number, x):
    """What enters the consumer of one expert, computed here; x (n, D) -> (n, I)."""
    weight, bias = experts.gate_up_proj[number], getattr(experts, "gate_up_proj_bias", None)
    made = x @ (weight if getattr(experts, "is_transposed", False) else weight.T)
    made = made if bias is None else made + bias[number]
    if bias is None:
        gate, up = made.chunk(2, dim=-1)
        return experts.act_fn(gate) * up
    gate, up = made[:, ::2].clamp(max=experts.limit), made[:, 1::2].clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(gate * experts.alpha)


def seen(model, batch):
    """What every layer's experts are called with, and the real tokens (N,)."""
    found, handles = {}, []
    for layer, experts in experts_of(model).items():
        take = lambda _, args, layer=layer: found.__setitem__(layer, args)  # noqa: E731
        handles.append(experts.register_forward_pre_hook(take))
    with torch.no_grad():
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found, batch["attention_mask"].bool().reshape(-1)


def energies(model, texts, weighted=False):
    """Mean square of the channels over the real tokens that reach each expert, by (layer, number)."""
    sums, counts = {}, {}
    for batch in texts:
        calls, real = seen(model, batch)
        for layer, (states, index, weights) in calls.items():
            experts = experts_of(model)[layer]
            for number in range(len(experts.down_proj)):
                token, place = torch.where(index == number)
                token, place = token[real[token]], place[real[token]]
                x = channels_of(experts, number, states[token]) * (weights[token, place, None] if weighted else 1)
                sums[layer, number] = sums.get((layer, number), 0) + x.square().sum(0)
                counts[layer, number] = counts.get((layer, number), 0) + len(token)
    return {key: total / max(counts[key], 1) for key, total in sums.items()}, counts


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_equals_own_zeroing(family):
    if not is_supported(family):
        pytest.skip(f"this transformers has no {family}")
    model, batch = built(family), batches(1, seed=5)[0]
    dense = logits(model, batch)
    strategies = ("wanda_sp", "flap", "magnitude", "obs") if family in ("mixtral", "gpt_oss") else ("wanda_sp",)
    for strategy in strategies:
        with cut(model, strategy, compensate=None) as pruned:
            got, kept, sites = logits(model, batch), dict(pruned.kept()), pruned.sites
        want = logits(zeroed(model, kept, sites), batch)
        assert close(got, want) < 1e-5, strategy
        layer = max(experts_of(model))
        index = seen(model, batch)[0][layer][1]
        number = int(index.bincount().argmax()) if index.dim() == 1 else int(index.reshape(-1).bincount().argmax())
        here = kept[layer, f"expert{number}"]
        kept[layer, f"expert{number}"] = here[1:]  # one wrong unit, of an expert that is used
        assert close(got, logits(zeroed(model, kept, sites), batch)) > 5e-5, strategy
        assert close(got, dense) > 0.05, strategy
    assert torch.equal(logits(model, batch), dense)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("weighted", [False, True])
def test_history_is_the_mean_over_routed_real_tokens(family, weighted):
    model = built(family)
    want, counts = energies(model, batches(), weighted)
    with cut(model, router_weights=weighted) as pruned:
        for site in (each for each in pruned.cuts if each.site.expert is not None):
            key = site.site.layer, site.site.expert
            assert site.history.table.shape == (1, site.site.units)
            torch.testing.assert_close(site.history.table[0], want[key], rtol=1e-5, atol=1e-7)
            assert int(site.history.rows[0]) == counts[key]
            scores = want[key].sqrt() * columns(experts_of(model)[key[0]], key[1]).abs().sum(0)
            kept = scores.topk(site.count).indices.sort().values
            assert site.fixed.tolist() == kept.tolist()


@pytest.mark.parametrize("strategy", ["pp", "full_batch_probing"])
@pytest.mark.parametrize("family", ["qwen3_next", "gpt_oss"])
def test_pp_routes_the_probe_as_the_router_says(family, strategy):
    """Every decision is computed here again: the probe's routed real tokens, the merge, the score, the history."""
    model, batch = built(family), batches(1, rows=5, seed=7)[0]
    history = energies(model, batches())[0]
    with cut(model, strategy, skip_layers=[], trace=True) as pruned:
        calls, real = seen(model, batch)
        decided = {(entry["layer"], entry["kind"]): entry for entry in pruned.trace}
        sites = {(c.site.layer, c.site.expert): c for c in pruned.cuts if c.site.expert is not None}
        after = {place: c.history.table[0].clone() for place, c in sites.items()}
        without = 0
        for (layer, number), found in after.items():
            if (layer, f"expert{number}") not in decided:
                assert not (calls[layer][1] == number).any()
                continue
            entry, (states, index, _) = decided[layer, f"expert{number}"], calls[layer]
            experts, length = experts_of(model)[layer], batch["input_ids"].shape[1]
            tokens = (torch.tensor(entry["rows"])[:, None] * length + torch.tensor(entry["positions"])).reshape(-1)
            probed = torch.zeros(len(states), dtype=torch.bool).index_fill_(0, tokens, True) & real
            mine = (index == number).any(1)
            merged = known = history[layer, number]
            if (probed & mine).any():
                probe = channels_of(experts, number, states[probed & mine]).square().mean(0)
                merged = torch.lerp(known, probe, probe / (probe + known + 1e-6))
            else:
                without += 1
            scores = merged * columns(experts, number).pow(4).sum(0).sqrt()
            kept = scores.topk(sites[layer, number].count).indices.sort().values
            assert entry["kept"] == kept.tolist()
            want = known.clone()
            if (mine & real).any():
                observed = channels_of(experts, number, states[mine & real]).square().mean(0)
                want[kept] = torch.lerp(observed, known, 0.99)[kept]
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
        assert without or strategy != "pp", "an expert without a probe token must be among them"


@pytest.mark.parametrize("strategy", ["pp", "wanda_sp"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation_keeps_the_units_of_the_prompt(family, strategy):
    model = built(family)
    ids = batches(1, rows=1, length=4, seed=9, padded=False)[0]["input_ids"]
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    with cut(model, strategy, skip_layers=[]) as pruned:
        got = model.generate(ids, **options)
        kept, sites = pruned.kept(), pruned.sites
    # Every expert is decided with the prompt, those that no token of it reaches, too: a later token may reach them.
    assert all(len(kept[site.layer, site.kind]) < site.units for site in sites if site.expert is not None)
    assert torch.equal(got, zeroed(model, kept, sites).generate(ids, **options))
    assert not torch.equal(got, model.generate(ids, **options))


@pytest.mark.parametrize("family", ["mixtral"])
def test_interleaved_generations_keep_their_units(family):
    model, plain = built(family), copy.deepcopy(built(family))
    texts = [batches(1, rows=1, seed=seed, padded=False)[0]["input_ids"] for seed in (21, 22)]
    with cut(model, "pp", skip_layers=[]) as pruned, torch.no_grad():
        runs = [(model(ids, use_cache=True), pruned.kept()) for ids in texts]
        assert runs[0][1] != runs[1][1]
        for ids, (output, kept) in zip(texts, runs, strict=True):
            step = output.logits[:, -1:].argmax(-1)
            got = model(step, past_key_values=output.past_key_values).logits
            want = zeroed(plain, kept, pruned.sites)(torch.cat([ids, step], 1), use_cache=False).logits[:, -1:]
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_experts_that_calibration_never_reached_are_scored_by_weights_and_named():
    model = copy.deepcopy(built("mixtral"))
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2] = 0
        model.model.layers[1].mlp.gate.weight[:2] *= 40
    text = batches(1, rows=1, length=3, padded=False)
    with cut(model, calibration=text) as pruned:
        missed = [(c.site.layer, c.site.expert) for c in pruned.cuts if c.state.unreached]
        assert (1, 2) in missed
        note = next(note for note in pruned.notes if "no token of calibration reached" in note)
        assert "layer 1 expert" in note and "by weights alone" in note
        for site in (each for each in pruned.cuts if each.state.unreached):
            weight = columns(experts_of(model)[site.site.layer], site.site.expert)
            assert site.fixed.tolist() == weight.abs().sum(0).topk(site.count).indices.sort().values.tolist()
    for strategy, more in (("obs", {}), ("flap", {}), ("pp", {"skip_layers": []}), ("wanda_sp", {"sequential": True})):
        with cut(model, strategy, calibration=text, **more) as pruned:
            assert torch.isfinite(logits(model, text[0])).all(), strategy
            assert any("no token of calibration reached" in note for note in pruned.notes), strategy
    with cut(model, compensate="least_squares", calibration=text) as pruned:
        assert torch.isfinite(logits(model, batches(1)[0])).all()


def test_compensation_inside_an_expert_keeps_its_mean_output():
    """Over the routed calibration tokens the mean output of each expert is that of the dense one."""
    model, text = built("mixtral"), batches()
    for compensate in ("mean", "least_squares"):
        with cut(model, compensate=compensate, skip_layers=[1]) as pruned:
            for site in (each for each in pruned.cuts if each.site.expert is not None):
                weight, bias = site.consumer_weights()
                dense = columns(experts_of(model)[0], site.site.expert)
                mean = torch.zeros(site.site.units)
                total = 0
                for batch in text:
                    (states, index, _), real = seen_dense(pruned, model, batch)
                    token = torch.where((index == site.site.expert).any(1) & real)[0]
                    mean += channels_of(experts_of(model)[0], site.site.expert, states[token]).sum(0)
                    total += len(token)
                mean /= max(total, 1)
                want = dense @ mean
                torch.testing.assert_close(weight @ mean[site.fixed] + bias, want, rtol=1e-3, atol=1e-4)


def seen_dense(pruned, model, batch):
    with pruned.dense():
        calls, real = seen(model, batch)
    return calls[0], real


def test_experts_are_sites_by_default_and_can_be_left_out():
    model = built("mixtral")
    with cut(model) as pruned:
        of_experts = pruned.ratio.decoder_parameters_cut
        assert {site.group for site in pruned.sites} == {"attention", "expert"}
        assert of_experts == pytest.approx(0.4, abs=0.02)
        whole = sum(p.numel() for p in model.parameters())
        lost = sum((c.site.units - c.count) * c.site.unit_parameters for c in pruned.cuts)
        assert pruned.active_parameters() == whole - lost
        with pruned.suspended(), cut(model, "magnitude", experts="keep") as other:
            assert {site.group for site in other.sites} == {"attention"}
            assert other.ratio.decoder_parameters_cut < 0.1


def test_refused_by_name():
    model = built("mixtral")
    for options, words in (
        (dict(strategy="gisp"), "takes gradients"),
        (dict(runtime={"compile": "default"}), "runtime.compile"),
        (dict(compensate={"name": "least_squares", "held_out": 2}), "parts by rows"),
        (dict(router_weights=True, compensate="mean"), "router_weights"),
        (dict(strategy="reap", experts="channels"), "set experts to whole"),
        (dict(experts="whole"), "one of whole experts"),
    ):
        with pytest.raises((SpecError, ModelError, DataError), match=words):
            cut(model, **options)
    dense = logits(model, batches(1)[0])
    broken = copy.deepcopy(model)
    broken.model.layers[0].mlp.experts.down_proj = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ModelError, match="without plain tensors"):
        cut(broken)
    with cut(model), pytest.raises(ModelError, match="already part of a pruned model"):
        cut(model)
    assert torch.equal(dense, logits(model, batches(1)[0]))


def test_allocators_that_measure_see_the_cuts_of_experts():
    """A loss is measured on the dense model with zeroes in the experts' channels."""
    model, text = built("mixtral"), batches(2, padded=False)
    with cut(model, "wanda_sp", allocator={"name": "sensitivity"}, calibration=text) as pruned:
        counts = {site.site.label: site.count for site in pruned.cuts}
        assert len(set(counts.values())) > 1


def test_copies_and_statistics_files(tmp_path):
    model, text = built("mixtral"), batches()
    file = tmp_path / "statistics.safetensors"
    with cut(model, statistics=file) as pruned:
        kept = pruned.kept()
        batch = batches(1)[0]
        got = logits(model, batch)
        copied = copy.deepcopy(model)
    assert torch.equal(got, logits(copied, batch))
    assert not torch.equal(got, logits(model, batch))
    with cut(model, statistics=file, calibration=text) as again:
        assert again.kept() == kept


def test_rows_that_reach_narrower_experts_are_all_counted():
    """Channels that are ranked over all experts leave these with different widths."""
    model = built("mixtral")
    with cut(model, skip_layers=[], allocator="global_ranking") as pruned:
        subject = Measuring(Loaded(model, None, {}), pruned, no_progress, {})
        assert len(set(pruned.counts.values())) > 1
        ids = Cost(batch_size=6, length=10).batch(subject, 10)
        counted, tokens = sum(operations(subject, ids).values()), ids.numel()
        assert counted != 6 * sum(operations(subject, ids[:1]).values())
        assert Cost(batch_size=6, length=10).evaluate(subject).values["flops"] == counted / tokens
