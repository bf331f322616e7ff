"""Loading models: folders written here, the bundled model in its place, and the errors for bad places."""

import json
import shutil

import pytest
import torch
import yaml
from prunekit.compress import PipelineSpec
from prunekit.compress.models import device_map, loading, source
from prunekit.compress.models.loading import fingerprint, load
from prunekit.compress.models.source import ModelSource
from prunekit.registry import ModelError
from pydantic import ValidationError


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")


@pytest.fixture
def folder(tmp_path, make_model, tokenizer):
    """A complete model folder, weights in bfloat16."""
    place = tmp_path / "model"
    make_model("llama-gqa").to(torch.bfloat16).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_a_folder_is_loaded_for_evaluation(folder, make_model):
    loaded = load(ModelSource(name=str(folder), device="cpu"))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.bfloat16  # auto: the checkpoint's own
    assert loaded.tokenizer("a", add_special_tokens=False)["input_ids"] == [2]
    assert fingerprint(loaded.model) == fingerprint(make_model("llama-gqa").to(torch.bfloat16))
    assert loaded.identity == {
        "name": str(folder),
        "revision": None,
        "commit": None,
        "trust_remote_code": False,
    }
    json.dumps(loaded.identity)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_and_attention_are_the_ones_asked_for(folder, dtype):
    model = load(ModelSource(name=str(folder), dtype=dtype, attention="eager", device="cpu")).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "eager"


def test_the_bundled_model_runs_in_float32_on_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(source, "MODEL", folder)
    loaded = load(ModelSource(device="cpu"))
    assert loaded.model.dtype == torch.float32 and loaded.identity["name"] == "bundled"
    assert load(ModelSource(device="cpu", dtype="bfloat16")).model.dtype == torch.bfloat16


def test_the_bundled_model_can_be_loaded_where_it_is():
    if not (source.MODEL / "model.safetensors").is_file():
        pytest.skip("the bundled model is not there")
    loaded = load(ModelSource())
    ids = loaded.tokenizer("The import statement", return_tensors="pt")["input_ids"]
    assert torch.isfinite(loaded.model(input_ids=ids.to(loaded.model.device)).logits).all()


def test_a_missing_bundled_model_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MODEL", tmp_path / "nothing")
    with pytest.raises(ModelError, match="bundled model is missing from"):
        load(ModelSource(device="cpu"))


@pytest.mark.parametrize(
    "name", ["./models/opt", "/nowhere/opt", "~/nowhere-opt", "a/b/c", "opt/", "..\\opt", "m.gguf"]
)
def test_a_path_that_does_not_exist_says_so(name):
    with pytest.raises(ModelError, match=r"^model\.name: folder .* does not exist"):
        load(ModelSource(name=name))


@pytest.mark.parametrize("name", ["prunekit-tests/absent", "prunekit-tests-absent"])
def test_a_hub_id_out_of_reach_says_that_the_hub_is_off(name):
    with pytest.raises(ModelError, match=rf"model of {name} cannot be loaded .*neither a folder here.*HF_HUB_OFFLINE"):
        load(ModelSource(name=name))


def test_folders_that_hold_no_model_are_named(tmp_path, folder):
    with pytest.raises(ModelError, match=r"folder .*empty has no config\.json"):
        (tmp_path / "empty").mkdir()
        load(ModelSource(name=str(tmp_path / "empty")))
    with pytest.raises(ModelError, match=r"model\.safetensors is a file; name the folder"):
        load(ModelSource(name=str(folder / "model.safetensors")))
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"the model of .* cannot be loaded .*save_pretrained"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_broken_weights_are_an_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"the model of .* cannot be loaded"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_weights_that_are_missing_are_an_error_not_random_numbers(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of the model's weights \(model\.layers\.1\.mlp\.up_proj\.weight"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_weights_of_another_shape_are_an_error(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))
    with pytest.raises(ModelError, match=r"down_proj\.weight: found \(128, 192\), expected \(128, 100\)"):
        load(ModelSource(name=str(folder), device="cpu"))


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_empty_shards_are_named_with_their_cause(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.empty(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight: found \(0,\), expected \(192, 128\).*ZeRO-3"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_weights_without_a_place_are_an_error_not_left_out(tmp_path, make_model, tokenizer):
    place = tmp_path / "model"
    make_model("llama-gqa", mlp_bias=True).save_pretrained(place)
    tokenizer.save_pretrained(place)
    load(ModelSource(name=str(place), device="cpu"))
    change_json(place / "config.json", mlp_bias=False)
    with pytest.raises(ModelError, match=r"no place for 9 weights .*layers\.0\.mlp\.down_proj\.bias.* and 6 more"):
        load(ModelSource(name=str(place), device="cpu"))
    change_json(place / "config.json", mlp_bias=True, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"no place for 12 weights .*model\.layers\.2\."):
        load(ModelSource(name=str(place), device="cpu"))


def test_stored_rotary_frequencies_are_harmless(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(ModelSource(name=str(folder), device="cpu"))
    frequencies = loaded.model.model.rotary_emb.inv_freq
    assert len(frequencies.unique()) == len(frequencies) > 1  # not the stored ones


@pytest.mark.parametrize("with_model", [True, False])
def test_adapters_are_named_with_what_to_do(folder, with_model):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    if not with_model:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"adapter_config\.json.*merge_and_unload.*base model a/b"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_empty_special_tokens_are_an_error(folder):
    change_json(folder / "tokenizer_config.json", bos_token="", eos_token="")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json .* sets bos_token, eos_token to an empty text"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_a_bos_token_beyond_the_embedding_is_an_error(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more{number}" for number in range(97)])
    tokenizer.add_special_tokens({"bos_token": "<beyond>"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"BOS token '<beyond>' has the id 100, but the model .* embeds 97 ids only"):
        load(ModelSource(name=str(folder), device="cpu"))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("kernel", ["someone/kernel", {"": "someone/kernel"}, "flash_attention_3", "paged|a/b"])
def test_a_config_cannot_ask_for_code_of_the_hub(folder, key, kernel, monkeypatch):
    import transformers.integrations.hub_kernels as hub

    monkeypatch.setattr(hub, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(hub, "get_kernel", lambda *_, **__: pytest.fail("code was asked for"))
    monkeypatch.setattr("transformers.modeling_utils.is_kernels_available", lambda *_, **__: True)
    change_json(folder / "config.json", **{key: kernel})
    with pytest.raises(ModelError, match=rf"{key} is .*Set model\.attention"):
        load(ModelSource(name=str(folder), device="cpu"))
    loaded = load(ModelSource(name=str(folder), device="cpu", attention="sdpa"))
    assert loaded.model.config._attn_implementation == "sdpa"


def test_nested_configs_cannot_ask_for_code_either(folder):
    change_json(folder / "config.json", per_layer_config={"0": {"_attn_implementation": "someone/kernel"}})
    with pytest.raises(ModelError, match=r"per_layer_config\.0\._attn_implementation is 'someone/kernel'"):
        load(ModelSource(name=str(folder), device="cpu", attention="sdpa"))


def test_transformers_own_attention_is_taken_from_a_config(folder):
    change_json(folder / "config.json", _attn_implementation="eager")
    assert load(ModelSource(name=str(folder), device="cpu")).model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \('gptq'\).*unquantised checkpoint"),
        ({"fusion_config": {"x": True}}, "fusion_config would replace parts"),
    ],
)
def test_quantised_and_fused_checkpoints_are_refused_by_name(folder, entry, complaint):
    change_json(folder / "config.json", **entry)
    with pytest.raises(ModelError, match=complaint):
        load(ModelSource(name=str(folder), device="cpu"))


@pytest.mark.parametrize("place", ["../outside.safetensors", "{absolute}", "link.safetensors"])
def test_weights_outside_of_the_folder_are_not_read(folder, place):
    from safetensors.torch import load_file

    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    if place == "link.safetensors":
        (folder / place).symlink_to(outside)
    names = dict.fromkeys(load_file(outside), place.format(absolute=outside))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(ModelError, match=r"only files of the model's own folder are read"):
        load(ModelSource(name=str(folder), device="cpu"))


def test_the_links_of_the_hubs_cache_are_followed(folder):
    """The cache keeps contents in blobs/ and links to them in snapshots/COMMIT/."""
    repository = folder.parent / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, repository / "blobs" / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    load(ModelSource(name=str(snapshot), device="cpu"))
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(ModelError, match=r"config\.json is not a regular file of its folder"):
        load(ModelSource(name=str(snapshot), device="cpu"))


def test_a_model_of_the_hubs_cache_is_known_by_its_commit(folder, tmp_path, monkeypatch):
    commit, repository = "0123456789" * 4, tmp_path / "cache" / "models--a--b"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert load(ModelSource(name="a/b", device="cpu")).identity["commit"] == commit
    change_json(repository / "snapshots" / commit / "config.json", _attn_implementation="a/kernel")
    with pytest.raises(ModelError, match=r"config\.json of a/b: _attn_implementation is 'a/kernel'"):
        load(ModelSource(name="a/b", device="cpu"))
    (repository / "snapshots" / commit / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"a/b holds a PEFT adapter"):
        load(ModelSource(name="a/b", device="cpu"))


def test_a_folder_without_a_tokenizer_is_an_error(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"the tokenizer of .* cannot be loaded"):
        load(ModelSource(name=str(folder), device="cpu"))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "prunekit_test_own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_models_with_their_own_code_need_trust(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (folder / "own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "prunekit_test_own", "auto_map": own}))
    with pytest.raises(ModelError, match=r"^model\.trust_remote_code: .*set trust_remote_code: true"):
        load(ModelSource(name=str(folder), device="cpu"))
    loaded = load(ModelSource(name=str(folder), device="cpu", trust_remote_code=True))
    assert type(loaded.model).__name__ == "OwnModel" and loaded.identity["trust_remote_code"]


@pytest.mark.parametrize(
    ("device", "complaint"),
    [
        ("gpu", r"model\.device: 'gpu' is not a device; use auto, cpu, cuda"),
        ("cuda", r"model\.device: cuda was asked for, but torch .* sees no CUDA device"),
        ("meta", r"model\.device: meta holds no weights"),
        ("vulkan", r"model\.device: torch .* cannot use vulkan here .*set model\.device: auto"),
        ("cuda:3", r"model\.device: cuda:3 was asked for, but torch .* sees no CUDA device"),
    ],
)
def test_devices_that_are_not_there(folder, monkeypatch, device, complaint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=complaint):
        load(ModelSource(name=str(folder), device=device))


def test_reasons_are_one_line_and_no_title_of_a_list():
    assert loading.reason_of(ValueError("bad\nand more")) == "ValueError: bad"
    assert loading.reason_of(ValueError("one of these: \n(1) a")) == loading.reason_of(ValueError()) == "ValueError"


def test_options_are_checked():
    with pytest.raises(ValidationError, match="'auto', 'float32', 'bfloat16' or 'float16'"):
        ModelSource(dtype="int8")
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ModelSource(nme="x")
    with pytest.raises(ValidationError):
        ModelSource().name = "x"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"device": "cpu", "max_memory": {"cpu": "1GiB"}}, "max_memory is for models .* but device is cpu"),
        ({"device": "cuda:0", "offload_folder": "x"}, "offload_folder is for models .* but device is cuda:0"),
        ({"max_memory": {"gpu": "1GiB"}}, "'gpu' is not a device; name cpu or the number"),
        ({"max_memory": {"disk": "1GiB"}}, "disk holds what does not fit elsewhere"),
        ({"max_memory": {"cpu": "1 gig"}}, "cpu: '1 gig' is not a size; write one such as 20GiB"),
        ({"max_memory": {"cpu": -1}}, "cpu: -1 is not a size"),
        ({"max_memory": {}}, "is empty; write one size"),
        ({"max_memory": {"0": 5, "cuda:0": 5}}, "device 0 is named twice"),
        ({"max_memory": "1GiB"}, "expected a mapping of devices and sizes"),
    ],
)
def test_memory_limits_that_mean_nothing_are_refused(options, complaint):
    with pytest.raises(ValidationError, match=complaint):
        ModelSource(**options)


def test_memory_limits_are_a_mapping_in_files_and_can_be_hashed():
    source = ModelSource(max_memory={0: "20GiB", "cpu": 1000})
    assert source.max_memory == (("0", "20GiB"), ("cpu", "1000"))
    assert hash(source) == hash(ModelSource(**source.model_dump())) and source == ModelSource(**source.model_dump())
    assert source.model_dump(mode="json", serialize_as_any=True)["max_memory"] == {"0": "20GiB", "cpu": "1000"}
    spec = PipelineSpec.of({"model": source, "prune": {"use": "magnitude", "ratio": 0.4}})
    written = yaml.safe_load(spec.to_yaml())
    assert written["model"]["max_memory"] == {"0": "20GiB", "cpu": "1000"}
    assert PipelineSpec.of(written).model == source


@pytest.mark.parametrize(("size", "expected"), [("20GiB", 20 * 2**30), ("1.5 GB", 1500000000), ("12", 12)])
def test_sizes(size, expected):
    assert device_map.bytes_of(size) == expected


@pytest.mark.parametrize("size", ["1gib", ""])
def test_what_is_not_a_size(size):
    with pytest.raises(ValueError, match=f"'{size}' is not a size; write one such as 20GiB"):
        device_map.bytes_of(size)


@pytest.mark.parametrize(
    ("limits", "size", "expected"),
    [
        ({}, 80, {0: 90, "cpu": 900}),  # one of them holds the model: the other stays free
        ({}, 250, {0: 90, 1: 180, "cpu": 900}),
        ({"1": "100", "cpu": "7"}, 150, {0: 90, 1: 100, "cpu": 7}),
        ({"0": "0"}, 150, {1: 180, "cpu": 900}),
    ],
)
def test_devices_and_what_they_may_hold(monkeypatch, limits, size, expected):
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: {0: 100, 1: 200, "cpu": 1000})
    assert device_map.budgets(limits, True, lambda: size) == expected
    assert device_map.budgets({}, False, lambda: size) == {"cpu": 900}


def test_the_size_of_a_model_is_known_before_it_is_loaded(folder):
    loaded = load(ModelSource(name=str(folder), device="cpu"))
    size = loading._size(ModelSource(name=str(folder)), str(folder), "auto", {})
    assert size == loaded.model.get_memory_footprint()


def test_devices_that_are_not_there_may_not_be_limited(folder):
    with pytest.raises(ModelError, match=r"^model\.max_memory: device 7 is not here; there are .*cpu\. Leave 7 out"):
        load(ModelSource(name=str(folder), max_memory={"7": "1GiB"}))


def test_a_model_that_fits_nowhere_says_so_and_leaves_no_folder(folder, tmp_path):
    with pytest.raises(ModelError, match=r"^model\.max_memory: no device can hold any part of .*cpu 100 bytes"):
        load(ModelSource(name=str(folder), max_memory={"cpu": 100}, offload_folder=str(tmp_path / "off")))
    assert not list((tmp_path / "off").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"^model\.offload_folder: no folder can be made in .*file"):
        load(ModelSource(name=str(folder), offload_folder=str(tmp_path / "file")))


def test_fingerprint_sees_every_bit_and_no_storage(make_model):
    model = make_model("llama-gqa")
    first = fingerprint(model)
    assert first == fingerprint(make_model("llama-gqa")) != fingerprint(make_model("llama-gqa", seed=1))
    weight = model.model.layers[2].mlp.down_proj.weight
    weight.data = weight.data.t().contiguous().t()  # the same values, stored by columns
    assert fingerprint(model) == first
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    assert fingerprint(model) != first
    assert fingerprint(make_model("llama-gqa").to(torch.bfloat16)) != first


def test_weights_without_values_have_no_fingerprint(make_model):
    with pytest.raises(ModelError, match="has no values, so the model has no fingerprint"):
        fingerprint(make_model("llama-gqa").to("meta"))


def test_a_copied_folder_has_the_same_fingerprint(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    one, two = (load(ModelSource(name=str(place), device="cpu")).model for place in (folder, copy))
    assert fingerprint(one) == fingerprint(two)
