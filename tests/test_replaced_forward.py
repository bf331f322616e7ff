"""Blocks whose forward was replaced: refused where a cut would be without effect."""

from functools import partial

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ModelError
from torch.nn import functional


def fused_mlp(mlp, x):
    gate, up = functional.linear(x, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])).chunk(2, -1)
    return functional.linear(functional.silu(gate) * up, mlp.down_proj.weight)


@pytest.mark.parametrize("where", ["class", "instance", "layer", "after"])
@pytest.mark.parametrize(
    ("strategy", "options"), [("magnitude", {}), ("wanda_sp", {}), ("flap", {}), ("pp", {}), ("reconstruct", {})]
)
def test_a_replaced_forward_that_never_calls_its_layers_is_refused(
    make_model, batches, monkeypatch, strategy, options, where
):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    mlp = model.model.layers[1].mlp

    def replace():
        if where == "layer":
            own = LlamaDecoderLayer.forward

            def layer_forward(layer, hidden_states, **kwargs):
                states = own(layer, hidden_states, **kwargs)
                return states if layer.mlp is not mlp else hidden_states + fused_mlp(mlp, hidden_states)

            monkeypatch.setattr(mlp, "forward", partial(fused_mlp, mlp))
            monkeypatch.setattr(LlamaDecoderLayer, "forward", layer_forward)
        elif where == "class":
            monkeypatch.setattr(LlamaMLP, "forward", fused_mlp)
        else:
            monkeypatch.setattr(mlp, "forward", partial(fused_mlp, mlp))

    first = 0 if where == "class" else 1
    expected = rf"layer {first} mlp: model\.layers\.{first}\.mlp computed without calling .*down_proj.*skip_layers"
    before = model.model.layers[0].mlp.gate_proj.__class__
    if where == "after":
        with prune(model, strategy, ratio=0.4, calibration=batches, **options):
            model(ids)
            replace()
            with pytest.raises(ModelError, match=expected):
                model(ids)
        return
    replace()
    if strategy != "magnitude":
        with pytest.raises(ModelError, match=expected):
            prune(model, strategy, ratio=0.4, calibration=batches, **options)
        assert model.model.layers[0].mlp.gate_proj.__class__ is before
    else:
        with prune(model, strategy, ratio=0.4), pytest.raises(ModelError, match=expected):
            model(ids)
    if where == "instance":
        with prune(model, strategy, ratio=0.2, calibration=batches, skip_layers=[1], **options):
            model(ids)


def test_a_replaced_forward_that_calls_its_layers_is_pruned(make_model, batches, monkeypatch):
    """Such as that of Liger's kernels."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def forward(mlp, x):
        return mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    found = []
    for _ in range(2):
        with prune(model, "wanda_sp", ratio=0.4, calibration=batches):
            found.append(model(ids).logits)
        monkeypatch.setattr(LlamaMLP, "forward", forward)
    torch.testing.assert_close(*found)
