"""Sliced equals zeroed: computing with the kept units only, or with all while the others weigh nothing."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.strategies.pp import PP

FAMILIES = ["llama-mha", "llama-gqa", "mistral", "qwen2", "qwen3", "opt"]
WIDE = {"llama": dict(intermediate_size=1600), "opt": dict(ffn_dim=1600)}


def masks(ids):
    right = torch.ones_like(ids)
    right[1, -7:] = 0
    right[3, -1:] = 0
    return {"full": None, "right": right, "left": right.flip(1)}


def logits(model, ids, mask, **options):
    with prune(model, trace=True, **options) as pruned, torch.no_grad():
        out = [model(ids, attention_mask=mask, use_cache=False).logits for _ in range(2)]
        return torch.stack(out), pruned.trace


def real(values, mask):
    return values if mask is None else values[:, mask.bool()]


@pytest.mark.parametrize("padding", ["full", "right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_equals_zeroed(make_model, batches, family, unit, attention, padding):
    model = make_model(family, attention=attention)
    ids = batches[0]["input_ids"]
    mask = masks(ids)[padding]
    options = dict(ratio=0.4, calibration=batches, attention_unit=unit)
    with torch.no_grad():
        dense = real(model(ids, attention_mask=mask, use_cache=False).logits[None], mask)
    for strategy, more in (("pp", {"compensate": "mean"}), ("flap", {}), ("wanda_sp", {})):
        sliced, trace = logits(model, ids, mask, strategy=strategy, applier="slice", **options, **more)
        zeroed, same = logits(model, ids, mask, strategy=strategy, applier="zero", **options, **more)
        assert [r["kept"] for r in trace] == [r["kept"] for r in same]
        torch.testing.assert_close(real(sliced, mask), real(zeroed, mask), atol=2e-5, rtol=1e-4)
        moved = (real(sliced, mask)[:1] - dense).abs().max()
        assert moved > 0.05, "the cut must be visible, or the check proves nothing"


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_wide_model_where_the_order_of_sums_matters(make_model, batches, family):
    model = make_model(family, **WIDE[family.split("-")[0]])
    ids = batches[1]["input_ids"]
    options = dict(strategy="pp", ratio=0.4, calibration=batches)
    sliced, _ = logits(model, ids, None, applier="slice", **options)
    zeroed, _ = logits(model, ids, None, applier="zero", **options)
    torch.testing.assert_close(sliced, zeroed, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_negative_control(make_model, batches, kind, monkeypatch):
    """One wrong unit in one layer moves the logits by far more than the tolerance."""
    from prunekit.compress.engine import decider

    model = make_model("llama-gqa")
    ids = batches[0]["input_ids"]
    options = dict(strategy="wanda_sp", ratio=0.4, calibration=batches)
    right, _ = logits(model, ids, None, **options)
    honest = decider.keep_highest
    done = []

    def one_wrong(scores, count):
        kept = honest(scores, count)
        if not done and (len(scores) == 4) == (kind == "attention"):
            done.append(True)
            others = [u for u in range(len(scores)) if u not in kept.tolist()]
            kept = torch.tensor(sorted([*kept.tolist()[:-1], others[-1]]))
        return kept

    monkeypatch.setattr(decider, "keep_highest", one_wrong)
    wrong, _ = logits(model, ids, None, **options)
    assert done
    assert (wrong - right).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_under_the_padding_does_not_matter(make_model, batches, family, side):
    model = make_model(family)
    ids = batches[0]["input_ids"]
    mask = masks(ids)[side]
    other = torch.where(mask.bool(), ids, (ids * 7 + 5) % 97)
    assert not torch.equal(ids, other)
    first, trace = logits(model, ids, mask, strategy="pp", ratio=0.4, calibration=batches)
    second, same = logits(model, other, mask, strategy="pp", ratio=0.4, calibration=batches)
    assert trace == same
    torch.testing.assert_close(real(first, mask), real(second, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_a_mask_given_by_position(make_model, batches, family):
    model = make_model(family)
    ids = batches[0]["input_ids"]
    mask = masks(ids)["right"]
    kept = []
    for call in (lambda m: m(input_ids=ids, attention_mask=mask), lambda m: m(ids, mask)):
        with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
            call(pruned._engine.decoder)
            kept.append(pruned.trace)
    assert kept[0] == kept[1]
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
        model(ids)
    assert pruned.trace != kept[0], "the mask must matter, or the check proves nothing"


class FirstMask(PP):
    """PP whose probe has the mask of the first positions."""

    def mask_positions(self, positions):
        return torch.arange(len(positions))


@pytest.mark.parametrize("family", ["llama-gqa", "mistral"])
def test_a_probe_under_left_padding_sees_what_it_sees_without(make_model, family):
    """A probe of exactly the real tokens decides as the same tokens without padding do; so it needs their own mask."""
    model = make_model(family)
    ids = torch.randint(3, 97, (1, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[:, :12] = 0
    kept = {}
    for name, tokens, attention_mask, options in [
        ("padded", ids, mask, {"selector": {"positions": 0.5}}),
        ("first", ids, mask, {"selector": {"positions": 0.5}, "strategy": FirstMask()}),
        ("alone", ids[:, 12:], None, {"selector": {"positions": 1.0}}),
    ]:
        with prune(model, **{"strategy": "pp", **options}, ratio=0.5, merger="probe_only", trace=True) as pruned:
            model(tokens, attention_mask=attention_mask, use_cache=False)
            kept[name] = [r["kept"] for r in pruned.trace]
    assert kept["padded"] == kept["alone"]
    assert kept["first"] != kept["alone"]


def test_a_short_probe_holds_the_first_real_token(make_model, batches):
    model = make_model("llama-gqa")
    ids = batches[0]["input_ids"][:, :16]
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    with prune(model, "pp", ratio=0.4, calibration=batches, trace=True) as pruned:
        model(ids, attention_mask=mask)
    assert all(r["positions"][0] == 4 for r in pruned.trace)


def test_padding_does_not_enter_calibration(make_model, batches):
    """Right-padded calibration sequences give the statistics of the same sequences, whatever the padding is."""
    model = make_model("opt")
    ids = batches[0]["input_ids"]
    mask = masks(ids)["right"]
    kept = []
    for filler in (0, 55):
        padded = torch.where(mask.bool(), ids, filler)
        with prune(model, "pp", ratio=0.4, calibration=[{"input_ids": padded, "attention_mask": mask}]) as pruned:
            kept.append(pruned._engine.histories()[-1].table)
    torch.testing.assert_close(kept[0], kept[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_half_precision(make_model, batches, family, dtype):
    model = make_model(family).to(dtype)
    ids = batches[0]["input_ids"]
    options = dict(strategy="pp", ratio=0.4, calibration=batches, compensate="mean")
    sliced, trace = logits(model, ids, None, applier="slice", **options)
    zeroed, _ = logits(model, ids, None, applier="zero", **options)
    assert sliced.dtype == dtype
    assert sliced.isfinite().all()
    assert len(trace) == 12
    torch.testing.assert_close(sliced.float(), zeroed.float(), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("shape", [(1, 24), (1, 1), (3, 7), (5, 2)])
@pytest.mark.parametrize("strategy", ["pp", "full_batch_probing"])
def test_batches_of_any_shape(make_model, batches, shape, strategy):
    model = make_model("llama-gqa")
    ids = torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(1))
    options = dict(strategy=strategy, ratio=0.4, calibration=batches)
    sliced, trace = logits(model, ids, None, applier="slice", **options)
    zeroed, _ = logits(model, ids, None, applier="zero", **options)
    torch.testing.assert_close(sliced, zeroed, atol=2e-5, rtol=1e-4)
    assert all(max(r["positions"]) < shape[1] and max(r["rows"]) < shape[0] for r in trace)
