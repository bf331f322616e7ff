"""Models larger than memory: part of the weights on disk, and the very same results as in memory."""

import gc
import json
import logging

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook
from prunekit.compress import Exporter, Pipeline, PipelineSpec, prune
from prunekit.compress.bundled import MODEL
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import fingerprint, load
from prunekit.compress.models.source import ModelSource
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators.cost import Cost
from prunekit.evaluators.passes import device_of
from prunekit.registry import ModelError
from prunekit.registry.tensors.devices import is_offloaded, places_of, stored_tensor
from safetensors.torch import load_file

from tests.test_empty_sites import by_hand, without

MEASURED = [
    {"name": "perplexity", "window": 32, "limit": 4, "batch_size": 2},
    {"name": "cost", "batch_size": 2, "length": 16},
    {"name": "latency", "batch_size": 1, "length": 16, "decode_steps": 1, "pairs": 1, "warmup": 0, "breakdown": False},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with biases in its attention, and the bundled tokenizer."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.3) if "bias" in name else parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def limits(folder):
    """Room in memory for the embeddings, two layers, and half a layer that no layer fits into."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    return {"cpu": 4 * int(model.get_input_embeddings().weight.numel() + 3.5 * layer)}


@pytest.fixture(scope="module")
def inside(folder):
    return load(ModelSource(name=str(folder), device="cpu"))


@pytest.fixture(scope="module")
def offloaded(folder, limits, tmp_path_factory):
    parent = tmp_path_factory.mktemp("offload")
    return load(ModelSource(name=str(folder), max_memory=limits, offload_folder=str(parent)))


def state_of(model):
    """What hooks and forwards its modules carry."""
    keys = ("forward", "_old_forward", "_hf_hook")
    return {n: (type(m), *(m.__dict__.get(key) for key in keys)) for n, m in model.named_modules()}


def test_what_does_not_fit_goes_to_disk_and_computes_the_same(inside, offloaded, batches):
    model = offloaded.model
    assert set(places_of(model)) == {"cpu", "disk"} and not places_of(inside.model)
    consumers = [layer.mlp.down_proj for layer in model.model.layers]
    assert {is_offloaded(consumer) for consumer in consumers} == {True, False}
    assert {consumer.weight.device.type for consumer in consumers} == {"cpu", "meta"}
    ids = batches[0]["input_ids"]
    assert torch.equal(model(ids).logits, inside.model(ids).logits)
    assert fingerprint(model) == fingerprint(inside.model)
    assert device_of(model).type == "cpu"


def test_what_was_asked_for_is_no_warning(folder, limits, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model = load(ModelSource(name=str(folder), max_memory=limits, offload_folder=str(tmp_path))).model
        assert "disk" in places_of(model) and not caplog.records
        logging.getLogger("accelerate.big_modeling").warning("another matter")
    assert caplog.messages == ["another matter"]
    assert not logging.getLogger("accelerate.big_modeling").filters


def test_with_enough_memory_nothing_of_accelerate_is_on_the_model(folder, inside):
    model = load(ModelSource(name=str(folder), max_memory={"cpu": "1GiB"})).model
    assert not any(hasattr(module, "_hf_hook") or "forward" in module.__dict__ for module in model.modules())
    assert fingerprint(model) == fingerprint(inside.model) and not places_of(model)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("pp", {}), ("flap", {}), ("flap", {"sequential": True, "allocator": "uniform"}), ("magnitude", {})],
)
def test_pruning_decides_and_computes_the_same(inside, offloaded, batches, strategy, options):
    ids, mask = batches[0]["input_ids"], torch.ones(4, 24, dtype=torch.int64)
    mask[1, :6] = 0

    def run(model):
        before, dense = state_of(model), model(ids).logits
        with prune(model, strategy, ratio=0.4, skip_layers=[0], calibration=batches[1:3], **options) as pruned:
            found = [model(ids).logits, model(ids, attention_mask=mask).logits]
            found.append(model.generate(ids[:2], max_new_tokens=3, do_sample=False))
            kept = pruned.kept()
            with pruned.suspended():
                assert state_of(model) == before and torch.equal(model(ids).logits, dense)
            with pruned.dense():
                assert torch.equal(model(ids).logits, dense)
            found.append(model(ids).logits)
        assert not torch.equal(found[0], dense)
        assert torch.equal(model(ids).logits, dense) and state_of(model) == before
        return found, kept

    (expected, kept), (found, kept_offloaded) = run(inside.model), run(offloaded.model)
    assert kept == kept_offloaded
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_what_is_folded_in_every_pass_is_counted_once_for_a_batch(offloaded, batches):
    options = dict(ratio=0.4, skip_layers=[0], calibration=batches[1:3], compensate="least_squares")
    with prune(offloaded.model, "wanda_sp", **options) as pruned:
        subject = Measuring(offloaded, pruned, no_progress, {})
        one, four = (Cost(batch_size=rows, length=12).evaluate(subject).values["compensation"] for rows in (1, 4))
    assert one == 4 * four > 0


@torch.no_grad()
def test_blocks_that_are_gone_are_not_loaded(inside, offloaded, batches, monkeypatch):
    gone = [(0, "attention"), (1, "mlp"), (2, "mlp"), (3, "attention"), (3, "mlp")]
    expected, ids = by_hand(inside.model, gone), batches[0]["input_ids"]
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=2)
    model, before = offloaded.model, state_of(offloaded.model)
    loaded, load = set(), AlignDevicesHook.pre_forward
    with without(model, gone), monkeypatch.context() as patch:
        patch.setattr(AlignDevicesHook, "pre_forward", lambda *args, **kw: loaded.add(args[1]) or load(*args, **kw))
        assert torch.equal(model(ids).logits, expected(ids).logits)
        layers = [[linear in loaded for linear in (a.self_attn.o_proj, a.mlp.up_proj)] for a in model.model.layers]
        assert layers == [[False, True], [True, False], [True, False], [False, False]]
        assert torch.equal(model.generate(ids[:2], **options), expected.generate(ids[:2], **options))
    assert torch.equal(model(ids).logits, inside.model(ids).logits) and state_of(model) == before
    with without(model, gone, use="wanda_sp", calibration=batches, compensate="mean"):
        found = model(ids).logits
    with without(inside.model, gone, use="wanda_sp", calibration=batches, compensate="mean"):
        assert torch.equal(inside.model(ids).logits, found)


def test_full_batch_probing_gives_way_and_comes_back(inside, offloaded, batches):
    ids, found = batches[0]["input_ids"], []
    for loaded in (inside, offloaded):
        with prune(loaded.model, "pp", ratio=0.4, calibration=batches[1:2]) as pruned:
            subject = Measuring(loaded, pruned, no_progress, {})
            with subject.full_batch():
                outputs, kept = loaded.model(ids).logits, subject.kept()
            found.append((outputs, loaded.model(ids).logits, kept, subject.kept()))
    (one, one_own, *kept), (other, other_own, *kept_offloaded) = found
    assert torch.equal(one, other) and torch.equal(one_own, other_own) and not torch.equal(one, one_own)
    assert kept == kept_offloaded


def test_no_gathered_copy_of_an_offloaded_weight_stays(inside, offloaded, batches):
    held = {}
    for where, model in (("inside", inside.model), ("offloaded", offloaded.model)):
        with prune(model, "magnitude", ratio=0.25) as pruned:
            model(batches[0]["input_ids"])
            held[where] = pruned.held_bytes()["gathered"]
    in_memory = sum(not is_offloaded(layer.mlp.down_proj) for layer in offloaded.model.model.layers)
    assert 0 < held["offloaded"] * 4 == held["inside"] * in_memory
    assert {layer.mlp.down_proj.weight.device.type for layer in offloaded.model.model.layers} == {"cpu", "meta"}


@pytest.mark.parametrize("strategy", ["pp", "flap", "wanda_sp", "magnitude"])
def test_the_pipeline_gives_the_same_results(folder, limits, inside, strategy):
    content = {
        "model": {"name": str(folder), "device": "auto", "max_memory": limits},
        "calibration": {"sequences": 4, "length": 32, "batch_size": 2},
        "prune": {"use": strategy, "ratio": 0.4, "skip_layers": [0]},
        "evaluate": MEASURED,
    }
    offloaded = Pipeline(content).measure().record
    expected = Pipeline({**content, "model": {"name": str(folder), "device": "cpu"}}).measure(loaded=inside).record
    json.dumps(offloaded.as_json())
    for one, other in zip(expected.metrics[:2], offloaded.metrics[:2], strict=True):
        assert (one.dense, one.pruned) == (other.dense, other.pruned)
        assert other.protocol["device"] == "cpu+disk" != one.protocol["device"] == "cpu"
    assert offloaded.metrics[2].pruned["prefill_seconds"] > 0
    assert expected.layers == offloaded.layers and expected.ratio == offloaded.ratio
    one, other = expected.model, offloaded.model
    assert one.device_map is None
    assert other.device_map == "cpu+disk: 20 modules on cpu, 19 on disk"
    assert other.model_copy(update={"device_map": None}) == one


@pytest.mark.parametrize("profile", ["hf-hetero", "hf-uniform", "padded"])
def test_the_same_weights_are_exported(folder, limits, profile, tmp_path):
    manifests = {}
    for where, model in (("inside", {"device": "cpu"}), ("offloaded", {"max_memory": limits})):
        content = {
            "model": {"name": str(folder), **model},
            "calibration": {"sequences": 4, "length": 32, "batch_size": 2},
            "prune": {"use": "wanda_sp", "ratio": 0.5, "compensate": "least_squares"},
            "evaluate": MEASURED[:1],
        }
        manifests[where] = Exporter(PipelineSpec.of(content), profile, tmp_path / where).export()
    assert "disk" in manifests["offloaded"].base.device_map
    written = [load_file(tmp_path / where / "model.safetensors") for where in manifests]
    assert set(written[0]) == set(written[1]) and "lm_head.weight" not in written[0]
    assert all(torch.equal(tensor, written[1][name]) for name, tensor in written[0].items())


def test_tied_weights_of_an_offloaded_model_are_written_once(make_model):
    """Offloaded, the two are no longer one parameter."""
    from accelerate import cpu_offload
    from prunekit.compress.export.weights import dense_tensors

    tied, own = (make_model("llama-gqa", tie_word_embeddings=True) for _ in range(2))
    own.lm_head.weight = torch.nn.Parameter(own.lm_head.weight + 1, requires_grad=False)
    for model in (tied, own):
        cpu_offload(model)
        assert {"lm_head.weight", "model.embed_tokens.weight"} <= dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in dense_tensors(tied) and "lm_head.weight" in dense_tensors(own)


def test_other_offloading_of_accelerate_works_too(make_model, batches):
    from accelerate import cpu_offload

    ids, results = batches[0]["input_ids"], []
    for offload in (False, True):
        model = make_model("opt", num_hidden_layers=2)  # its MLP's entry is an offloaded linear layer itself
        if offload:
            cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
        with prune(model, "pp", ratio=0.4, calibration=batches[1:2], compensate="mean"):
            results.append(model(ids).logits)
    # Weights in memory are stored by columns then, and the last bit of the mean's output depends on it.
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_layers_that_lost_accelerates_hooks_are_cut_all_the_same(make_model, batches):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    ids, (plain, freed) = batches[0]["input_ids"], (make_model("llama-gqa") for _ in range(2))
    cpu_offload(freed, execution_device=torch.device("cpu"))
    remove_hook_from_submodules(freed)
    with prune(plain, "magnitude", ratio=0.4), prune(freed, "magnitude", ratio=0.4):
        assert torch.equal(plain(ids).logits, freed(ids).logits)
    assert torch.equal(plain(ids).logits, freed(ids).logits)


def test_a_replaced_forward_is_refused(make_model):
    model = make_model("llama-gqa")
    down = model.model.layers[1].mlp.down_proj
    down.forward = lambda x: torch.nn.functional.linear(x, down.weight)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: something has replaced the forward"):
        prune(model, "magnitude", ratio=0.4)


def test_weights_without_values_are_refused(make_model):
    with pytest.raises(ModelError, match="no hook of accelerate loads them"):
        prune(make_model("llama-gqa").to("meta"), "magnitude", ratio=0.4)


def test_the_offload_folder_goes_with_the_model(folder, limits, tmp_path):
    state = load_file(folder / "model.safetensors")
    other = tmp_path / "bin"
    other.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (other / file.name).write_bytes(file.read_bytes())
    torch.save(state, other / "pytorch_model.bin")  # cannot be read piece by piece: disk weights are written anew
    loaded = load(ModelSource(name=str(other), max_memory=limits, offload_folder=str(tmp_path / "here")))
    (own,) = (tmp_path / "here").iterdir()
    assert any(own.iterdir())
    name = "model.layers.3.mlp.down_proj.weight"
    assert torch.equal(stored_tensor(loaded.model, name), state[name])
    del loaded
    gc.collect()
    assert not own.exists()
