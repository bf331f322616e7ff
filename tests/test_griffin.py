"""GRIFFIN, BWAP and GLASS keep what a plain computation of their formulas keeps, and decode the same tokens."""

import copy

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ChannelHistory
from prunekit.strategies.griffin import LargestShare, MeanShare
from torch.nn import functional

from tests.policy_models import ByCall, kept_by_call, prompts, small_model
from tests.test_policies import generated

KEPT = 48


@pytest.fixture(scope="module")
def dense():
    return small_model()


def activations(model, ids, **options):
    """What enters every down_proj for a prompt, by the formula of the MLP: act(gate) * up, (B, T, C) by layer."""
    found = []

    def keep(mlp, args):
        found.append(functional.silu(mlp.gate_proj(args[0])) * mlp.up_proj(args[0]))

    handles = [layer.mlp.register_forward_pre_hook(keep) for layer in model.model.layers]
    model(ids, **options)
    for handle in handles:
        handle.remove()
    return found


def griffin_scores(z, real=None):
    """The L2 norm over tokens of the token-normalised activations; z (B, T, C) -> (B, C)."""
    normed = z / z.norm(dim=-1, keepdim=True)
    if real is not None:
        normed = normed * real[..., None]
    return normed.square().sum(1).sqrt()


def top(scores, count=KEPT):
    return sorted(scores.argsort(descending=True)[:count].tolist())


@torch.no_grad()
def test_griffin_equals_its_formula_and_decodes_the_same_tokens(dense):
    model, ids = copy.deepcopy(dense), prompts(1)
    with prune(model, "griffin", ratio=0.5, trace=True) as pruned:
        tokens, logits = generated(model, ids)
        kept = {r["layer"]: r["kept"] for r in pruned.trace}
        assert [r["kind"] for r in pruned.trace] == ["mlp", "mlp"]
    z = activations(dense, ids)
    assert kept == {layer: top(griffin_scores(each)[0]) for layer, each in enumerate(z)}
    by_squares = [top(each[0].square().sum(0)) for each in z]
    assert by_squares != [kept[0], kept[1]], "the prompt must tell normalised from plain activations"
    text, cache = ids, None  # as in the paper: a dense prompt, then weights that are gathered once
    halves = copy.deepcopy(dense)
    for step in range(10):
        found = halves(text if step == 0 else text[:, -1:], past_key_values=cache, use_cache=True)
        cache = found.past_key_values
        torch.testing.assert_close(found.logits[:, -1], logits[step], rtol=1e-3, atol=1e-3)
        text = torch.cat([text, found.logits[:, -1:].argmax(-1)], 1)
        for layer, block in enumerate(halves.model.layers if step == 0 else ()):
            units = torch.tensor(kept[layer])
            for name in ("gate_proj", "up_proj"):
                linear = getattr(block.mlp, name)
                linear.weight = torch.nn.Parameter(linear.weight[units])
            block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight[:, units])
    assert torch.equal(text, tokens)
    assert not torch.equal(tokens, generated(dense, ids)[0])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_rows_count_alike_in_griffin_and_the_largest_in_bwap(dense, padded):
    model, ids, mask = copy.deepcopy(dense), prompts(3), torch.ones(3, 12, dtype=torch.long)
    mask[1, : 5 * padded] = 0
    scores = [griffin_scores(z, mask) for z in activations(dense, ids, attention_mask=mask)]
    expected = {
        "griffin": [top(each.square().sum(0)) for each in scores],
        "bwap": [top(each.amax(0)) for each in scores],
    }
    found = {}
    for name in expected:
        with prune(model, name, ratio=0.5, trace=True) as pruned:
            model(ids, attention_mask=mask, use_cache=True)
            found[name] = [r["kept"] for r in pruned.trace]
    assert found["bwap"] == expected["bwap"] != expected["griffin"]
    if not padded:  # a position with fewer tokens is a mean over fewer rows
        assert found["griffin"] == expected["griffin"]


@torch.no_grad()
def test_bwap_chooses_again_from_the_tokens_since(dense):
    model, ids = copy.deepcopy(dense), prompts(2)
    with prune(model, "bwap", ratio=0.5, trace=True, policy={"n": 4}) as pruned:
        tokens, logits = generated(model, ids)
        records, policy = pruned.trace, pruned.strategy.policy
    assert not policy.prunes_prompt and policy.n == 4
    oracle = ByCall(dense, pruned.sites, kept_by_call(policy, records, 12))
    expected, wanted = generated(oracle.model, ids)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    assert len(records) == 6
    for record in records[2:]:
        calls = [position - 11 for position in record["positions"]]
        z = torch.cat([oracle.seen[call, record["layer"], "mlp"] for call in calls], 1)
        assert record["kept"] == top(griffin_scores(z).amax(0))


@torch.no_grad()
@pytest.mark.parametrize("prior", [0.0, 0.3, 1.0])
def test_glass_merges_ranks_with_those_of_calibration(dense, prior):
    model, ids, calibration = copy.deepcopy(dense), prompts(1), [{"input_ids": prompts(4, 12, seed=s)} for s in (1, 2)]
    options = dict(ratio=0.5, calibration=calibration, trace=True, merger={"prior": prior})
    with prune(model, "glass", **options) as pruned:
        model(ids, use_cache=True)
        found = [r["kept"] for r in pruned.trace]
    local = activations(dense, ids)
    text = activations(dense, torch.cat([each["input_ids"] for each in calibration]))
    for layer, kept in enumerate(found):
        ranks = [griffin_scores(z).square().sum(0).argsort().argsort() for z in (local[layer], text[layer])]
        merged = (1 - prior) * ranks[0] + prior * ranks[1]
        cut = merged.sort(descending=True).values[[KEPT - 1, KEPT]]
        assert {i for i, r in enumerate(merged.tolist()) if r > cut[1]} <= set(kept)
        assert merged[kept].min() >= cut[0] - 1e-4
    griffin = [top(griffin_scores(z)[0]) for z in local]
    assert (found == griffin) == (prior == 0)
    with prune(model, "glass", **options):
        assert model(prompts(1, 30), use_cache=True).logits.isfinite().all()


@pytest.mark.parametrize("statistic", [MeanShare(), LargestShare()])
def test_shares_sum_to_one_token_by_token(statistic):
    x, valid = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([0, 2, 1])[:, None]
    history = ChannelHistory(8, torch.device("cpu"))
    statistic.observe(history, x[:2] * 1e3, valid[:2])
    statistic.observe(history, x[2:], valid[2:])
    torch.testing.assert_close(history.table.sum(1), torch.ones(5))
    shares = (x / x.norm(dim=-1, keepdim=True)).square() * valid[..., None]
    torch.testing.assert_close(history.table, shares.sum(0) / valid.sum(0)[:, None])
    measured = statistic.measure(x * 1e3, valid, None)
    if statistic.name == "largest_share":
        torch.testing.assert_close(measured.sum(0), shares.sum(1).amax(0))
    else:
        torch.testing.assert_close(measured, history.table)


@torch.no_grad()
def test_only_mlps_are_cut_and_notes_say_so(dense):
    model = copy.deepcopy(dense)
    with prune(model, "griffin", ratio=0.5) as pruned:
        assert set(pruned.counts.values()) == {KEPT, 2}
        assert not any("rounds to none" in note for note in pruned.notes)
        assert any("the prompt runs with all units" in note for note in pruned.notes)
    with prune(model, "griffin", ratio=0.3, allocator={"mlp_multiple": 16}) as pruned:
        assert set(pruned.counts.values()) == {80, 2}
