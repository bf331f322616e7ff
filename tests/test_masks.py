"""Every form of an attention mask gives a probe the same tokens, or is refused."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import DataError, ModelError

CAUSAL = torch.ones(24, 24, dtype=torch.bool).tril()
MIXED = dict(layer_types=["full_attention", "sliding_attention", "full_attention"], sliding_window=8)


def floats(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.fixture
def decided(make_model, batches):
    """Logits and kept units of one batch."""

    def run(attention="sdpa", family="llama-gqa", selector="residual_norm", model=None, **given):
        pruned_model = make_model(family, attention=attention, **(model or {}))
        options = dict(ratio=0.4, calibration=batches, trace=True, selector=selector)
        with torch.no_grad(), prune(pruned_model, "pp", **options) as pruned:
            logits = pruned_model(use_cache=False, **given).logits
        return logits, [record["kept"] for record in pruned.trace]

    return run


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("selector", ["residual_norm", "spread"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_the_same_in_four_dimensions(decided, batches, attention, selector, side):
    real = torch.ones(4, 24, dtype=torch.long)
    for row, count in ((0, 7), (2, 3)):
        real[row, :count] = 0
    real = real if side == "left" else real.flip(1)
    places = (real.cumsum(1) - 1).clamp(min=0)
    given = dict(attention=attention, selector=selector, input_ids=batches[0]["input_ids"], position_ids=places)
    expected, kept = decided(attention_mask=real, **given)
    assert kept != decided(**given)[1], "padding must matter, or the check proves nothing"
    whole = CAUSAL & real[:, None, None].bool()
    for mask in (floats(whole), whole) if attention == "sdpa" else (floats(whole),):
        logits, own = decided(attention_mask=mask, **given)
        assert own == kept
        torch.testing.assert_close(logits[real.bool()], expected[real.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selector", ["residual_norm", "spread"])
def test_packed_sequences_do_not_see_each_other_in_a_probe(decided, batches, selector):
    given = dict(input_ids=batches[0]["input_ids"][:1], selector=selector)
    places = torch.cat([torch.arange(10), torch.arange(14)])[None]
    apart = CAUSAL.clone()
    apart[10:, :10] = False
    found = decided(position_ids=places, **given)
    stated = decided(position_ids=places, attention_mask=floats(apart)[None, None], **given)
    assert found[1] == stated[1]
    torch.testing.assert_close(found[0], stated[0])


def test_masks_by_kind_of_layer(decided, batches):
    ids = batches[0]["input_ids"]
    near = CAUSAL & ~torch.ones(24, 24, dtype=torch.bool).tril(-8)
    masks = {"full_attention": floats(CAUSAL)[None, None], "sliding_attention": floats(near)[None, None]}
    options = dict(family="qwen2", model={**MIXED, "use_sliding_window": True})
    plain, stated = decided(input_ids=ids, **options), decided(input_ids=ids, attention_mask=masks, **options)
    assert plain[1] == stated[1]
    torch.testing.assert_close(plain[0], stated[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [torch.ones(4, 24, 24), torch.ones(24, 24), torch.ones(4, 5), "all"])
def test_other_masks_are_refused(decided, batches, mask):
    with pytest.raises(DataError, match=r"attention_mask: expected a tensor \(B, 24\), or \(B, 1, 24, keys\), found "):
        decided(input_ids=batches[0]["input_ids"], attention_mask=mask)


def test_flex_attention_has_no_mask_to_probe_with(make_model, batches):
    model = make_model("llama-gqa", attention="flex_attention")
    for strategy, options in (("pp", {}), ("wanda_sp", {"compensate": "probe_mean"})):
        with pytest.raises(ModelError, match=r"attn_implementation flex_attention.*load it with.*'sdpa', or use"):
            prune(model, strategy, ratio=0.4, calibration=batches, **options)
    prune(model, "magnitude", ratio=0.4).remove()
    model.set_attn_implementation("sdpa")
    with prune(model, "pp", ratio=0.4, calibration=batches):
        model.set_attn_implementation("flex_attention")
        with pytest.raises(ModelError, match="the attention mask is a BlockMask, of which a probe cannot take a part"):
            model(batches[0]["input_ids"], use_cache=False)
