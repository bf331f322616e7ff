"""Saving a pruned model: the smaller one by ``pruned.save``; other ways write the dense one, or are refused."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ModelError
from safetensors.torch import load_file, save_file, save_model

STRATEGIES = [("pp", {}), ("wanda_sp", {}), ("flap", {"attention_unit": "query_head"})]


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_what_writes_the_model_in_place_writes_the_dense_one(make_model, batches, tmp_path, strategy, options, family):
    model, ids = make_model(family), batches[0]["input_ids"]
    model.save_pretrained(tmp_path / "before")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with prune(model, strategy, ratio=0.4, calibration=batches, **options) as pruned:
        expected = logits(model, ids)
        with pytest.warns(UserWarning, match=r"save_pretrained writes the dense model.*pruned\.save\(DIR\)"):
            model.save_pretrained(tmp_path / "during")
        save_model(model, tmp_path / "model.safetensors")
        shared = model.state_dict()
        save_file(
            {name: t for name, t in shared.items() if name in load_file(tmp_path / "model.safetensors")},
            tmp_path / "state.safetensors",
        )
        pruned.reset()
        assert torch.equal(logits(model, ids), expected)
        assert all(shared[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "before" / name).read_text() == (tmp_path / "during" / name).read_text()
    for file in ("model.safetensors", "state.safetensors", "during/model.safetensors"):
        found = load_file(tmp_path / file)
        assert found and all(torch.equal(tensor, before[name]) for name, tensor in found.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path / "after")
    assert "save_pretrained" not in vars(model)


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES)
def test_pickle_is_refused_by_name_and_a_copy_is_not(make_model, batches, strategy, options):
    model = make_model("llama-gqa")
    with prune(model, strategy, ratio=0.4, calibration=batches, **options) as pruned:
        parts = [
            model,
            model.model,
            model.model.layers[0],
            model.model.layers[0].mlp,
            model.model.layers[0].mlp.up_proj,
        ]
        for part in [*parts, pruned]:
            for write in (lambda x: torch.save(x, io.BytesIO()), pickle.dumps):
                with pytest.raises(ModelError, match=r"cannot be pickled.*pruned\.save\(DIR\) or prunekit export"):
                    write(part)
        twin = copy.deepcopy(model)
        torch.save(model.state_dict(), io.BytesIO())
    with pytest.raises(ModelError):
        pickle.dumps(twin)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again, batches[0]["input_ids"]), logits(model, batches[0]["input_ids"]))


@pytest.mark.parametrize("strategy", ["pp", "flap"])
def test_float64_models_are_pruned_as_float32_ones(make_model, batches, strategy):
    ids, found, kept = batches[0]["input_ids"], [], []
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for dtype in (torch.float32, torch.float64):
        model = make_model("llama-gqa").to(dtype)
        with prune(model, strategy, ratio=0.4, calibration=batches) as pruned, torch.no_grad():
            found += [model(ids).logits, model(ids, attention_mask=mask).logits]
            kept.append(pruned.kept())
            assert found[-1].dtype == dtype
    assert kept[0] == kept[1]
    torch.testing.assert_close(found[0].double(), found[2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1].double(), found[3], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("first", "then"), [("sdpa", "eager"), ("eager", "sdpa")])
@pytest.mark.parametrize("strategy", ["pp", "flap"])
def test_the_attention_may_be_set_while_query_heads_are_cut(make_model, batches, strategy, first, then):
    model, ids = make_model("llama-gqa", attention=first), batches[0]["input_ids"]
    dense = logits(model, ids)
    frozen = {"merger": {"momentum": 1.0}} if strategy == "pp" else {}
    with prune(model, strategy, ratio=0.4, calibration=batches, attention_unit="query_head", **frozen) as pruned:
        expected = logits(model, ids)
        model.set_attn_implementation(then)
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=1e-4)
        assert model.config._attn_implementation == f"prunekit_{then}"
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(ModelError, match=r"this model has 'flex_attention'.*set_attn_implementation\('sdpa'\)"):
            logits(model, ids)
        model.set_attn_implementation(then)
        with pruned.dense():
            torch.testing.assert_close(logits(model, ids), dense, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == then
    torch.testing.assert_close(logits(model, ids), dense, rtol=1e-4, atol=1e-4)


def test_two_prunings_of_query_heads_in_different_layers(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    dense, options = logits(model, ids), dict(ratio=0.1, calibration=batches, attention_unit="query_head")
    first = prune(model, "flap", skip_layers=[0, 1], **options)
    second = prune(model, "flap", skip_layers=[2], **options)
    both = logits(model, ids)
    first.remove()
    assert model.config._attn_implementation == "sdpa" and not torch.equal(logits(model, ids), both)
    second.remove()
    assert model.config._attn_implementation == "sdpa" and torch.equal(logits(model, ids), dense)
