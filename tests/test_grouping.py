"""Rows of a batch that choose their own units, alone or in clusters: each equals its row alone, and zeroed columns."""

import copy
import io

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.models.small import small_model as built
from prunekit.registry import DataError, SpecError
from prunekit.strategies.grouping import ByLikeness
from torch.nn import functional
from transformers import DynamicCache, StaticCache

from tests.policy_models import prompts, small_model
from tests.test_policies import generated, steps

CALIBRATION = [{"input_ids": prompts(4, 24, seed=3)}]
MASK = torch.tensor([[0] * 5 + [1] * 7, [1] * 12, [0] * 2 + [1] * 10, [1] * 12])
STILL = {"name": "importance_scaled", "momentum": 1.0}
CASES = {
    "pp": ("pp", {"merger": STILL}),
    "pp, query heads": ("pp", {"merger": STILL, "attention_unit": "query_head"}),
    "pp, prefill_only": ("pp", {"merger": STILL, "attention_unit": "query_head", "policy": "prefill_only"}),
    "pp, decode_only": ("pp", {"merger": STILL, "attention_unit": "query_head", "policy": "decode_only"}),
    "pp, zero": ("pp", {"merger": STILL, "applier": "zero", "policy": "decode_only"}),
    "pp, mean": ("pp", {"merger": STILL, "compensate": "mean"}),
    "pp, random probe": ("pp", {"merger": STILL, "selector": "spread"}),
    "griffin": ("griffin", {}),
    "griffin, per_prompt": ("griffin", {"policy": "per_prompt"}),
    "glass": ("glass", {}),
}


@pytest.fixture(scope="module")
def dense():
    return small_model()


def pruned_by(model, name, group_by="row", **more):
    strategy, options = CASES[name]
    needed = {} if name.startswith("griffin") else {"calibration": CALIBRATION}
    return prune(model, strategy, ratio=0.5, group_by=group_by, trace=True, **needed, **options, **more)


def units_of_rows(pruned, rows):
    """The kept units of every row in the last prompt, by layer and kind."""
    found = {}
    last = pruned.trace[-1]["batch"]
    for record in pruned.trace:
        if record["batch"] == last:
            for row in record.get("group", range(rows)):
                found.setdefault((record["layer"], record["kind"]), {})[row] = record["kept"]
    return found


# A row in a batch and alone


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_row_in_a_batch_equals_the_row_alone(dense, name, padded):
    """Same tokens, same logits, same units; alone it has no padding, and one decision a batch."""
    model, ids = copy.deepcopy(dense), prompts(4)
    with pruned_by(model, name) as pruned:
        mask = {"attention_mask": MASK} if padded else {}
        logits = model(ids, **mask).logits
        kept = units_of_rows(pruned, 4)
        tokens, steps = generated(model, ids, **mask)
        assert any(len(set(map(tuple, rows.values()))) > 1 for rows in kept.values()), "rows must differ"
    with pruned_by(model, name, "row" if name == "pp, random probe" else "batch") as pruned:
        for row in range(4):
            own = ids[row : row + 1, -int(MASK[row].sum()) :] if padded else ids[row : row + 1]
            pruned.reset()
            length = own.shape[1]
            torch.testing.assert_close(logits[row, -length:], model(own).logits[0], rtol=1e-3, atol=1e-3)
            alone = units_of_rows(pruned, 1)
            assert all(units[0] == kept[place][row] for place, units in alone.items())
            expected, wanted = generated(model, own)
            assert torch.equal(tokens[row, 12:], expected[0, length:])
            torch.testing.assert_close(steps[:, row], wanted[:, 0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pp", "griffin, per_prompt", "pp, random probe"])
def test_results_do_not_depend_on_the_other_rows(dense, name):
    model, ids, others = copy.deepcopy(dense), prompts(4), prompts(4, 20, seed=9)
    mask = torch.ones(4, 20, dtype=torch.long)
    mask[:2, :8] = 0
    mixed = torch.cat([functional.pad(ids[2:], (8, 0)), others[:2]])
    with pruned_by(model, name, calibration=CALIBRATION) if name.startswith("griffin") else pruned_by(model, name):
        first = model(ids).logits
        second = model(ids.flip(0)[:3]).logits
        third = model(mixed, attention_mask=mask).logits
    torch.testing.assert_close(second, first.flip(0)[:3], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(third[:2, 8:], first[2:], rtol=1e-3, atol=1e-3)
    with pruned_by(model, name, "batch"):
        assert (model(mixed, attention_mask=mask).logits[:2, 8:] - model(ids).logits[2:]).abs().max() > 0.1


# Against zeroed columns


class ZeroedByRow:
    """A copy of the dense model of which every row reads its own units alone; prompts may stay whole."""

    def __init__(self, dense, sites, kept, dense_prompt=False, means=None):
        self.model, self.calls, self.dense_prompt = copy.deepcopy(dense), 0, dense_prompt
        self.model.model.register_forward_pre_hook(self._begin)
        for site in sites:
            rows = kept.get((site.layer, site.kind))
            if rows:
                mask = torch.zeros(len(rows), 1, site.channels)
                for row, units in rows.items():
                    mask[row, 0, site.columns(torch.tensor(units))] = 1
                fill = 0 if means is None else means[site.layer, site.kind]
                consumer = self.model.get_submodule(site.consumer)
                consumer.register_forward_pre_hook(
                    lambda _, args, mask=mask, fill=fill: self._zero(args[0], mask, fill)
                )

    def _begin(self, *_):
        self.calls += 1

    def _zero(self, x, mask, fill):
        return (x,) if self.dense_prompt and self.calls == 1 else (x * mask + (1 - mask) * fill,)


@torch.no_grad()
@pytest.mark.parametrize("group_by", ["row", {"name": "cluster", "clusters": 2}])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["pp", "pp, query heads", "pp, mean", "griffin", "griffin, per_prompt"])
def test_generation_equals_zeroing_row_by_row(dense, name, padded, group_by):
    model, ids = copy.deepcopy(dense), prompts(4)
    mask = {"attention_mask": MASK} if padded else {}
    with pruned_by(model, name, group_by) as pruned:
        tokens, logits = generated(model, ids, **mask)
        kept = units_of_rows(pruned, 4)
        means = None
        if name == "pp, mean":
            means = {(cut.site.layer, cut.site.kind): cut.history.mean for cut in pruned.cuts}
    groups = 4 if group_by == "row" else 2
    assert max(len(set(map(tuple, rows.values()))) for rows in kept.values()) == groups
    late = name == "griffin"
    oracle = ZeroedByRow(dense, pruned.sites, kept, late, means)
    expected, wanted = generated(oracle.model, ids, **mask)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
    place = (1, "mlp")
    kept[place] = {row: kept[place][(row + 1) % 4] for row in range(4)}
    wrong = generated(ZeroedByRow(dense, pruned.sites, kept, late, means).model, ids, **mask)[1]
    assert (wrong - wanted).abs().max() > 5e-3


# Clusters


@torch.no_grad()
@pytest.mark.parametrize("name", ["pp", "griffin"])
def test_one_cluster_is_the_batch_and_as_many_as_rows_are_rows(dense, name):
    model, ids, found = copy.deepcopy(dense), prompts(4), {}
    for group_by in ("batch", "row", {"name": "cluster", "clusters": 1}, {"name": "cluster", "clusters": 9}):
        with pruned_by(model, name, group_by):
            found[str(group_by)] = generated(model, ids, attention_mask=MASK)[1]
    batch, row, one, many = found.values()
    # The last digits of equal products depend on where torch has put the operands.
    torch.testing.assert_close(one, batch, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(many, row, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(batch, row, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["per_prompt", "decode_only"])
def test_a_cluster_decides_like_a_batch_of_its_rows(dense, policy):
    """Two kinds of rows, of a token again and again: they fall apart, and each kind decides as if it were alone."""
    model, kinds = copy.deepcopy(dense), torch.tensor([0, 1, 1, 0, 1])
    ids = torch.stack([torch.full((12,), 5), torch.full((12,), 40)])[kinds]
    ids[:, -1] = torch.arange(10, 15)
    options = dict(ratio=0.5, policy=policy, trace=True)
    with prune(model, "griffin", group_by={"name": "cluster", "clusters": 2}, **options) as pruned:
        logits = generated(model, ids)[1]
        kept = units_of_rows(pruned, 5)
        assert {tuple(r["group"]) for r in pruned.trace} == {(0, 3), (1, 2, 4)}
    with prune(model, "griffin", **options) as pruned:
        for rows in ([0, 3], [1, 2, 4]):
            torch.testing.assert_close(logits[:, rows], generated(model, ids[rows])[1], rtol=1e-3, atol=1e-3)
            alone = units_of_rows(pruned, len(rows))
            assert all(kept[place][rows[0]] == own[0] for place, own in alone.items())


def test_clusters_are_by_the_cosine_of_the_scores():
    first, second = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, 3.0])
    scores = torch.stack([first, second, 100 * first, 0.01 * second + 0.001, first + 0.1])
    assert ByLikeness(clusters=2).groups(scores).tolist() in ([0, 1, 0, 1, 0], [1, 0, 1, 0, 1])
    three = ByLikeness(clusters=3).groups(scores).tolist()
    assert three[0] == three[2] and three[1] != three[0] and len(set(three)) == 3


# What history learns


@torch.no_grad()
@pytest.mark.parametrize("storage", [{}, {"pool": 4}])
@pytest.mark.parametrize("padded", [False, True])
def test_history_learns_of_every_channel_from_the_rows_that_compute_it(dense, padded, storage):
    model, ids = copy.deepcopy(dense), prompts(4)
    mask = MASK if padded else torch.ones_like(MASK)
    options = dict(ratio=0.5, calibration=CALIBRATION, merger={"name": "importance_scaled", "momentum": 0.5})
    with prune(model, "pp", group_by="row", trace=True, history=storage, **options) as pruned:
        before = [cut.history.at(torch.arange(12)) for cut in pruned.cuts]
        model(ids, attention_mask=MASK if padded else None)
        after = [cut.history.at(torch.arange(12)) for cut in pruned.cuts]
        kept, sites = units_of_rows(pruned, 4), pruned.sites
    oracle, seen = ZeroedByRow(dense, sites, kept), {}
    for site in sites:
        consumer = oracle.model.get_submodule(site.consumer)
        consumer.register_forward_pre_hook(lambda _, args, place=(site.layer, site.kind): seen.update({place: args[0]}))
    oracle.model(ids, attention_mask=MASK if padded else None)
    for site, old, new in zip(sites, before, after, strict=True):
        computes = torch.zeros(4, 1, site.channels)
        for row, units in kept[site.layer, site.kind].items():
            computes[row, 0, site.columns(torch.tensor(units))] = 1
        weight = computes * mask[..., None]
        squares, tokens = (weight * seen[site.layer, site.kind].square()).sum(0), weight.sum(0)
        if storage:
            place = (torch.arange(12) + 3) // 4
            squares, tokens = (torch.zeros(4, site.channels).index_add(0, place, t)[place] for t in (squares, tokens))
        wanted = torch.where(tokens > 0, torch.lerp(squares / tokens.clamp(min=1), old, 0.5), old)
        torch.testing.assert_close(new, wanted, rtol=1e-3, atol=1e-5)
        assert (new != old).any(1).all() and not torch.equal(tokens.amax(), tokens.amin())


# Caches


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_interleaved_conversations_and_copies_of_caches(dense, kind):
    model, first, second = copy.deepcopy(dense), prompts(3), prompts(3, seed=8)
    make = DynamicCache if kind == "dynamic" else lambda config: StaticCache(config=config, max_cache_len=40)
    with pruned_by(model, "pp"):
        alone = []
        for prompt, other in ((first, second), (second, first)):
            cache = make(config=model.config)
            model(prompt, past_key_values=cache, use_cache=True)
            alone.append(steps(model, cache, other))
        caches = [make(config=model.config) for _ in range(2)]
        for prompt, cache in zip((first, second), caches, strict=True):
            model(prompt, past_key_values=cache, use_cache=True)
        caches[0] = copy.deepcopy(caches[0])
        file = io.BytesIO()
        torch.save(caches[1], file)
        file.seek(0)
        caches[1] = torch.load(file, weights_only=False)
        both = [[], []]
        for i in range(12):
            for place, other in enumerate((second, first)):
                both[place] += steps(model, caches[place], other[:, i : i + 1])
    for expected, found in zip(alone, both, strict=True):
        assert all(map(torch.equal, expected, found))


@torch.no_grad()
def test_rows_of_a_cache_stay_where_they_are(dense):
    model, ids = copy.deepcopy(dense), prompts(3)
    with pruned_by(model, "pp"):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        for move, rows in (
            ("reorder_cache", torch.tensor([1, 0, 2])),
            ("batch_select_indices", [0]),
            ("batch_repeat_interleave", 2),
        ):
            with pytest.raises(DataError, match=r"units of their own .* cannot be reordered"):
                getattr(copy.deepcopy(cache), move)(rows)
        for part in cache.layers:
            part.batch_repeat_interleave(2)
        with pytest.raises(DataError, match="layer 0 mlp: a batch of 6 rows continues a key/value cache of 3"):
            model(ids[:, :1].repeat(2, 1), past_key_values=cache, use_cache=True)
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-12)
        model(ids[:1].expand(3, -1), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(2)
        assert len(steps(model, cache, prompts(6, 2))) == 2, "equal rows have one decision, which all may share"


@torch.no_grad()
def test_rows_that_have_ended_do_not_change_the_others(dense):
    model, ids = copy.deepcopy(dense), prompts(4)
    with pruned_by(model, "pp"):
        tokens = generated(model, ids)[0]
        end = int(tokens[0, 14])
        ended = generated(model, ids, eos_token_id=end)[0]
    for row in range(4):
        made = tokens[row, 12:].tolist()
        length = made.index(end) + 1 if end in made else len(made)
        assert ended[row, 12 : 12 + length].tolist() == made[:length]
    assert (ended[0, 15:] == 0).all()


# Gradients, freezing, the default


def test_gradients_reach_every_row(dense):
    model, ids = copy.deepcopy(dense), prompts(3)
    model.requires_grad_(True)
    with pruned_by(model, "pp") as pruned:
        model(ids).logits.square().mean().backward()
        kept, found = units_of_rows(pruned, 3), model.model.layers[0].mlp.down_proj.weight.grad
    oracle = ZeroedByRow(dense, pruned.sites, kept)
    oracle.model.requires_grad_(True)
    oracle.model(ids).logits.square().mean().backward()
    torch.testing.assert_close(found, oracle.model.model.layers[0].mlp.down_proj.weight.grad, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_units_are_frozen_by_the_mean_score_of_the_rows(dense):
    model = copy.deepcopy(dense)
    with prune(model, "griffin", ratio=0.5, policy="per_prompt", group_by="row", trace=True) as pruned:
        with pytest.raises(SpecError, match="with group_by: row its rows kept different units; use mean-score"):
            pruned.freeze("last", [{"input_ids": prompts(3)}])
        model(prompts(3))
        last = {place: tuple(rows[0]) for place, rows in units_of_rows(pruned, 3).items()}
        assert last.items() <= pruned.kept().items() and len(last) == 2
        kept = pruned.freeze("mean-score", [{"input_ids": prompts(3)}])
        assert len(kept[0, "mlp"]) == 48 and not pruned.strategy.group_by.splits
        generated(model, prompts(2), num_beams=2)


@torch.no_grad()
def test_the_default_is_one_decision_a_batch(dense):
    model, ids = copy.deepcopy(dense), prompts(4)
    with prune(model, "pp", ratio=0.5, merger="probe_only") as pruned:
        expected = model(ids).logits
        assert "group_by" not in pruned.strategy.model_dump(serialize_as_any=True)
    with prune(model, "pp", ratio=0.5, merger="probe_only", group_by="batch", trace=True) as pruned:
        assert torch.equal(model(ids).logits, expected)
        assert not any("group" in record for record in pruned.trace)
    assert torch.equal(model(ids).logits, dense(ids).logits)


# Refused before anything is computed


def unread():
    raise AssertionError("calibration was read")
    yield


REFUSED = [
    ("wanda_sp", {}, "is for strategies that choose units for every batch; leave it out"),
    ("pp", {"selector": {"ahead": True}}, "excludes ahead: true .*; set ahead to false"),
    ("bwap", {}, "excludes policy every_n, .*; use policy: decode_only"),
    ("griffin", {"policy": "drift"}, "excludes policy drift, .*; use policy: decode_only"),
    ("pp", {"compensate": "probe_mean"}, "excludes compensator probe_mean, .*; use compensate: mean"),
    ("pp", {"turns": "keep", "allocator": "global_adaptive"}, "excludes turns: keep, .*; use turns: refuse"),
    ("pp", {"runtime": {"compile": "default"}}, "excludes runtime.compile: default; leave compile out"),
]


@pytest.mark.parametrize("group_by", ["row", "cluster"])
@pytest.mark.parametrize(("strategy", "options", "words"), REFUSED)
def test_what_cannot_be_honoured_is_refused(group_by, strategy, options, words):
    with pytest.raises(SpecError, match=f"group_by: {group_by} {words}"):
        prune(small_model(), strategy, ratio=0.5, group_by=group_by, calibration=unread(), **options)


BUILT = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4}}


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "words", "options"),
    [
        ("mixtral", "layer 0 expert 0: a routed expert reads .*; nearest: experts: keep", {"experts": "keep"}),
        ("bloom", "alibi is cut for all rows alike; nearest: allocator: mlp_only, applier: zero", {"applier": "zero"}),
        ("bloom", "layer 0 attention: alibi is cut .*: allocator: mlp_only, .*", {"allocator": "mlp_only"}),
        ("gpt_neo", "adds terms of positions to its scores; nearest: allocator: mlp_only", {"allocator": "mlp_only"}),
    ],
)
def test_sites_that_rows_cannot_share_out_are_refused_with_what_works(kind, words, options):
    model, ids, chosen = (
        built(kind, **BUILT.get(kind, {})),
        prompts(3),
        {"ratio": 0.5, "calibration": unread(), "group_by": "row"},
    )
    with pytest.raises(SpecError, match=f"group_by: row: .*{words}, group_by: batch"):
        prune(model, "pp", **chosen)
    chosen |= {"merger": "probe_only", **options}
    with prune(model, "pp", **chosen):
        both = model(ids).logits
        for row in range(3):
            torch.testing.assert_close(both[row], model(ids[row : row + 1]).logits[0], rtol=1e-3, atol=1e-4)


def test_unknown_groupings_are_refused():
    for group_by, words in (("rows", "row"), ({"name": "cluster", "clusters": 0}, "greater than or equal to 1")):
        with pytest.raises(SpecError, match=words):
            prune(small_model(), "pp", ratio=0.5, group_by=group_by, calibration=unread())


@torch.no_grad()
def test_beams_are_refused(dense):
    model = copy.deepcopy(dense)
    with pruned_by(model, "griffin"):
        with pytest.raises(SpecError, match=r"generate\(num_beams=3\): group_by: row .* use num_beams=1, or"):
            generated(model, prompts(2), num_beams=3)
        generated(model, prompts(2), do_sample=True, num_return_sequences=2)
