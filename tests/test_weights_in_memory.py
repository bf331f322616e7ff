"""Where weights lie while a model is pruned per batch: consumers by columns, copies in memory that is used again."""

import torch
from prunekit.compress import prune
from prunekit.compress.models.loading import fingerprint


def is_column_major(weight):
    return not weight.is_contiguous() and weight.t().is_contiguous()


# Weights by columns


def test_consumers_lie_by_columns_while_the_model_is_pruned_per_batch(make_model, batches):
    model = make_model("llama-gqa")
    names = ["self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"]

    def column_major(layer):
        return [is_column_major(model.get_submodule(f"model.layers.{layer}.{name}").weight) for name in names]

    alias = model.model.layers[1].mlp.down_proj.weight.data
    before, values, digest = alias.clone(), model.model.layers[1].mlp.down_proj.weight, fingerprint(model)
    strides, place = values.stride(), values.data_ptr() % 64
    with prune(model, "pp", ratio=0.4, skip_layers=[0], calibration=batches):
        assert column_major(0) == [False] * 3 and column_major(1) == column_major(2) == [True, True, False]
        assert model.model.layers[1].mlp.down_proj.weight is values and torch.equal(values, before)
        assert torch.equal(alias, before), "what shares the old memory must stay as it was"
        assert fingerprint(model) == digest
    assert column_major(1) == [False] * 3
    assert values.stride() == strides and values.data_ptr() % 64 == place and torch.equal(values, before)
    with prune(model, "wanda_sp", ratio=0.4, calibration=batches):
        assert column_major(1) == [False] * 3, "a cut made once gathers once"
    with prune(model, "pp", ratio=0.4, calibration=batches, runtime={"column_major": False}):
        assert column_major(1) == [False] * 3


def test_a_pruned_model_can_be_saved(make_model, batches, tmp_path):
    import transformers

    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches):
        model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert fingerprint(again) == fingerprint(model)


def test_weights_that_lie_in_memory_of_others_keep_their_layout(make_model, batches):
    model = make_model("llama-gqa")
    weights = [model.model.layers[n].mlp.down_proj.weight for n in range(3)]
    both = torch.cat([weights[0].data, weights[1].data])
    for n in (0, 1):
        weights[n].data = both.chunk(2)[n]
    weights[2].data.share_memory_()
    with prune(model, "pp", ratio=0.4, calibration=batches), torch.no_grad():
        assert not any(is_column_major(weight) for weight in weights)
        assert is_column_major(model.model.layers[0].self_attn.o_proj.weight)
        model(batches[0]["input_ids"], use_cache=False)
    assert weights[0].untyped_storage().data_ptr() == both.untyped_storage().data_ptr() and weights[2].is_shared()


# Shared memory


def pieces(pruned):
    return {buffer.data_ptr() for buffer in pruned._engine.shared.gatherer.buffers}


def test_all_layers_gather_into_the_same_memory(make_model, batches):
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    with prune(model, "pp", ratio=0.5, calibration=batches) as pruned, torch.no_grad():
        assert not pieces(pruned)
        model(ids, use_cache=False)
        first = pieces(pruned)
        assert len(first) == 4 + 3  # q, k, v, o and gate, up, down, however many layers there are
        model(ids[:2, :9], use_cache=False)
        assert pieces(pruned) == first
        model(ids, use_cache=True)
        assert not pieces(pruned), "nobody gathers into it meanwhile"
        own = [tensor.data_ptr() for cut in pruned._engine.cuts for tensor in cut.copies()]
        assert len(set(own)) == 3 * 7, "cuts that serve several passes have memory of their own"
        model(ids, use_cache=False)
        assert len(pieces(pruned)) == 7
    assert not pieces(pruned)


def test_memory_grows_to_the_largest_site(make_model, batches):
    model = make_model("llama-gqa")
    allocator = {"name": "explicit", "attention": [0.5, 0.25, 0.5], "mlp": [0.6, 0.4, 0.2]}
    options = dict(ratio=None, allocator=allocator, calibration=batches)
    with prune(model, "pp", **options) as pruned, torch.no_grad():
        model(batches[0]["input_ids"], use_cache=False)
        assert len(pieces(pruned)) == 7
        width = pruned.counts[2, "mlp"]
        assert max(buffer.numel() for buffer in pruned._engine.shared.gatherer.buffers) == 128 * width
