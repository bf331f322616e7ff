"""Weights that change while a model is pruned: the next prompt computes with what they are then."""

import copy

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine import weights
from prunekit.compress.engine.weights import contents
from prunekit.registry import complement


def zeroed(model, kept, sites):
    """A copy of the dense ``model`` with the consumers' columns of dropped units zero."""
    twin = copy.deepcopy(model)
    for site in sites:
        columns = site.columns(torch.tensor(kept[site.layer, site.kind]))
        dropped = complement(columns, site.channels)
        twin.get_submodule(site.consumer).weight.data[:, dropped] = 0
    return twin


def write(change, weight):
    with torch.no_grad():
        if change == "one element":
            weight.data[-1, 0] += 3
        elif change == "rows in another order":
            weight.data.copy_(weight.flip(0))
        elif change == "columns in another order":
            weight.data.copy_(weight.roll(1, 1))
        elif change == "numpy":
            weight.detach().numpy()[...] *= -1
        else:
            weight.data.mul_(0.5)


CHANGES = ["scaled", "one element", "rows in another order", "columns in another order", "numpy"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("strategy", ["magnitude", "wanda_sp", "pp"])
def test_weights_that_torch_does_not_count_as_written_are_noticed(make_model, batches, strategy, change):
    """Every matrix, through ``.data`` and through numpy, without a key/value cache and with one."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    with prune(model, strategy, ratio=0.4, calibration=batches) as pruned, torch.no_grad():
        for cached in (False, True):
            for name, weight in model.model.layers.named_parameters():
                if weight.dim() == 2:
                    model(ids, use_cache=cached)
                    write(change, weight)
                    pruned.reset()
                    found = model(ids, use_cache=cached).logits
                    kept = pruned.kept()
                    with pruned.suspended():
                        expected = zeroed(model, kept, pruned.sites)(ids).logits
                    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("compensate", ["mean", "least_squares"])
def test_compensation_follows_weights_that_torch_does_not_count_as_written(make_model, batches, compensate):
    found = []
    for counted in (True, False):
        model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
        with prune(model, "wanda_sp", ratio=0.4, calibration=batches, compensate=compensate), torch.no_grad():
            model(ids)
            for weight in model.model.layers.parameters():
                weight.mul_(0.5) if counted else weight.data.mul_(0.5)
            found.append(model(ids).logits)
    assert torch.equal(*found)


def test_decode_steps_use_the_weights_of_their_prompt_until_refresh(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    with prune(model, "magnitude", ratio=0.4, skip_layers=[1]) as pruned, torch.no_grad():
        steps = []
        for refreshes in (None, False, True):
            cache = model(ids, use_cache=True).past_key_values
            weights = [linear.weight for linear, _ in pruned.cuts[1].binding.producers]
            for weight in weights if refreshes is not None else ():
                weight.data.mul_(0.5)
            if refreshes:
                pruned.refresh()
            steps.append(model(ids[:, :1], past_key_values=cache, use_cache=True).logits)
            for weight in weights if refreshes is not None else ():
                weight.data.mul_(2)
            model(ids)
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_contents_of_a_tensor_change_with_every_element(dtype, monkeypatch):
    monkeypatch.setattr(weights, "WIDTH", 101)
    for shape in ((7,), (3, 5), (61, 67), (67, 31)):
        tensor = torch.randn(shape, dtype=dtype)

        def known(tensor=tensor):
            return torch.cat(contents(tensor))

        before = known()
        for element in range(tensor.numel()):
            was = tensor.view(-1)[element].clone()
            tensor.view(-1)[element] = torch.nextafter(was, was + 1)
            assert not torch.equal(known(), before)
            tensor.view(-1)[element] = was
        assert torch.equal(known(), before) and not torch.equal(torch.cat(contents(tensor.flip(0))), before)
