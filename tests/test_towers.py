"""Language models inside of models that also read images: found, pruned, loaded and exported."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from prunekit.compress import Pipeline, prune
from prunekit.compress.cli.families import INSIDE, served
from prunekit.compress.models.language import READ_IMAGES, auto_class
from prunekit.compress.models.likeness import Like
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import Catalog, ModelError, SpecError

TEXT = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
)
QWEN_VISION = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=32,
)
QWEN_TOKENS = dict(image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63)
IMAGE = 60
"""The token that an image stands at; four of them make an image."""


def rope(*sections):
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}


def configs(family):
    t = transformers
    if family == "llava":
        vision = t.CLIPVisionConfig(**{**VISION, "image_size": 8})
        return t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT), vision_config=vision, image_token_index=IMAGE, image_seq_length=4
        )
    if family == "gemma3":
        text = t.Gemma3TextConfig(
            **TEXT, sliding_window=8, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        )
        return t.Gemma3Config(
            text_config=text,
            vision_config=t.SiglipVisionConfig(**VISION),
            mm_tokens_per_image=4,
            image_token_index=IMAGE,
            boi_token_index=58,
            eoi_token_index=59,
        )
    if family == "mistral3":
        vision = t.PixtralVisionConfig(**VISION, head_dim=8)
        return t.Mistral3Config(
            text_config=t.MistralConfig(**TEXT), vision_config=vision, image_token_index=IMAGE, spatial_merge_size=2
        )
    if family == "qwen2_5_vl":
        vision = dict(**QWEN_VISION, window_size=16, fullatt_block_indexes=[0])
        return t.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope(1, 1, 2)}, vision_config=vision, **QWEN_TOKENS
        )
    if family == "qwen2_vl":
        vision = dict(
            depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=1, patch_size=4, spatial_merge_size=2
        )
        return t.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope(1, 1, 2)}, vision_config=vision, **QWEN_TOKENS
        )
    if family == "qwen3_5":
        text = dict(
            **TEXT,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_conv_kernel_dim=3,
            rope_parameters={**rope(1, 1, 2), "partial_rotary_factor": 1.0},
        )
        vision = dict(**QWEN_VISION, num_position_embeddings=16)
        return t.AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, **QWEN_TOKENS)
    if family == "qwen3_vl":
        vision = dict(**QWEN_VISION, num_position_embeddings=16, deepstack_visual_indexes=[0])
        return t.Qwen3VLConfig(
            text_config={**TEXT, "rope_parameters": rope(2, 1, 1)}, vision_config=vision, **QWEN_TOKENS
        )
    if family == "smolvlm":
        return t.SmolVLMConfig(
            text_config=t.LlamaConfig(**TEXT),
            vision_config=VISION,
            image_token_id=IMAGE,
            scale_factor=2,
            pad_token_id=0,
        )
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    return t.InternVLConfig(
        text_config=t.Qwen2Config(**TEXT),
        vision_config=vision,
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


TOWERS = ["llava", "gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "internvl"]


def build(family, attention="sdpa"):
    """A tiny model whose weights are random, norms and biases too."""
    if family == "qwen3_5" and family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = configs(family)
    model = auto_class(config).from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.data.copy_(0.3 * noise + name.endswith("weight"))
    return model.eval().requires_grad_(False)


def call(family, seed=0):
    """Two rows of 12 tokens with an image each, the second one padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 55, (2, 12), generator=generator)
    ids[:, 5:9] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    shape = {
        "llava": (2, 3, 8, 8),
        "smolvlm": (2, 1, 3, 16, 16),
        "qwen2_vl": (32, 96),
        "qwen2_5_vl": (32, 96),
        "qwen3_5": (32, 96),
        "qwen3_vl": (32, 96),
    }.get(family, (2, 3, 16, 16))
    found["pixel_values"] = torch.randn(shape, generator=generator)
    if family == "mistral3":
        found["image_sizes"] = torch.tensor([[16, 16]] * 2)
    if family.startswith("qwen"):
        found |= {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": (ids == IMAGE).long()}
    return found


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


class Oracle:
    """A copy of the dense model whose dropped units weigh nothing where they are read."""

    def __init__(self, model, sites):
        self.model, self.sites = copy.deepcopy(model), {(site.layer, site.kind): site for site in sites}
        self.weights = {place: self.weight(site).clone() for place, site in self.sites.items()}

    def weight(self, site):
        return self.model.get_submodule(site.consumer).weight

    def logits(self, kept, given):
        for place, units in kept.items():
            site, weight = self.sites[place], self.weights[place].clone()
            dropped = torch.ones(site.units, dtype=torch.bool)
            dropped[list(units)] = False
            weight.view(len(weight), site.units, -1)[:, dropped] = 0
            self.weight(site).copy_(weight)
        return self.model(**given, use_cache=False).logits


def texts():
    generator = torch.Generator().manual_seed(9)
    return [{"input_ids": torch.randint(3, 55, (2, 12), generator=generator)} for _ in range(2)]


def far(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


CASES = [
    ("pp", "kv_group", "sdpa"),
    ("pp", "query_head", "eager"),
    ("full_batch_probing", "kv_group", "eager"),
    ("flap", "query_head", "sdpa"),
    ("wanda_sp", "kv_group", "eager"),
]


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_the_language_model_inside_is_pruned_with_images_in_the_call(family, catalog):
    for attention in ("sdpa", "eager"):
        model, given = build(family, attention), call(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        dense, real = model(**given, use_cache=False).logits, given["attention_mask"].bool()
        for strategy, unit, _ in (case for case in CASES if case[2] == attention):
            options = dict(ratio=0.4, calibration=texts(), catalog=catalog, attention_unit=unit)
            oracle = Oracle(model, find_sites(model, catalog, unit)[1])
            with prune(model, strategy, trace=True, compensate="none", **options) as pruned:
                found = model(**given, use_cache=False).logits[real]
                kept = {(record["layer"], record["kind"]): record["kept"] for record in pruned.trace}
                expected = oracle.logits(kept, given)[real]
                assert far(found, expected) < 2e-4
                assert far(found, dense[real]) > 0.01
                for place, units in kept.items():  # one other unit
                    others = set(range(oracle.sites[place].units)) - set(units)
                    if not others:
                        continue
                    wrong = {**kept, place: [*units[1:], min(others)]}
                    assert far(oracle.logits(wrong, given)[real], expected) > 1e-3, place
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert torch.equal(model(**given, use_cache=False).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_images_count_as_tokens_and_generation_keeps_the_prompts_units(family, catalog):
    model, given = build(family), call(family)
    oracle = Oracle(model, find_sites(model, catalog, "kv_group")[1])
    steps = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
    chosen = []
    for seed in (0, 1):  # the same text, another image
        given = {**given, "pixel_values": call(family, seed)["pixel_values"]}
        options = dict(ratio=0.4, calibration=texts(), catalog=catalog, trace=True)
        with prune(model, "full_batch_probing", **options) as pruned:
            found = model.generate(**given, **steps)
            (*decided,) = pruned.trace
        assert len(decided) == len(oracle.sites)  # by the prompt, once
        assert all(record["positions"] == list(range(12)) for record in decided)
        kept = {(record["layer"], record["kind"]): record["kept"] for record in decided}
        oracle.logits(kept, given)
        assert torch.equal(found, oracle.model.generate(**given, **steps))
        chosen.append(kept)
    assert chosen[0] != chosen[1]


def test_a_model_is_loaded_whole_unless_its_configuration_names_the_language_model(tmp_path, make_tokenizer):
    """Both classes of Qwen 3.5 take its configuration, and that of the language model alone leaves the tower out."""
    build("qwen3_5").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    whole = load(ModelSource(name=str(tmp_path), device="cpu")).model
    assert type(whole).__name__ == "Qwen3_5ForConditionalGeneration" and hasattr(whole.model, "visual")
    config = configs("qwen3_5")
    assert auto_class(config) is transformers.AutoModelForImageTextToText
    config.architectures = ["Qwen3_5ForCausalLM"]
    assert auto_class(config) is transformers.AutoModelForCausalLM
    assert auto_class(transformers.LlamaConfig()) is transformers.AutoModelForCausalLM


def test_types_that_read_images_are_listed(catalog, command):
    code, output = command("families")
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert sorted(TOWERS) == sorted(READ_IMAGES) and all(f"`{family}`" in page for family in TOWERS)
    assert code == 0 and ", ".join(READ_IMAGES) in " ".join(output.split())
    with pytest.raises(SpecError, match=r"'gemma3' is a model that also reads images, .* leave architecture out"):
        Like(like="gemma3").only(catalog)


def test_every_type_that_is_only_inside_of_others_is_tested_here(catalog):
    listed = [each for each in served(catalog) if each.tested == INSIDE]
    assert listed and {each.model_type for each in listed} <= {configs(each).text_config.model_type for each in TOWERS}


def test_a_module_without_the_familys_layers_is_named(catalog):
    model = build("llava")
    model.model.language_model.layers = torch.nn.Sequential(*model.model.language_model.layers)
    with pytest.raises(ModelError, match="this LlavaForConditionalGeneration has no llama language model with layers"):
        prune(model, "magnitude", ratio=0.4, catalog=catalog)


def test_two_kinds_of_attention_are_put_back(catalog):
    model, given = build("llava"), call("llava")
    model.model.vision_tower.set_attn_implementation("eager")
    with prune(model, "magnitude", ratio=0.4, catalog=catalog, attention_unit="query_head"):
        assert model.model.vision_tower.config._attn_implementation == "eager"
        assert model.model.language_model.config._attn_implementation == "prunekit_sdpa"
        model(**given)
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_pipeline_file_loads_calibrates_and_measures_on_text(family, tmp_path, make_tokenizer):
    build(family).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(50, (600,), generator=generator).tolist()
    (tmp_path / "text.txt").write_text(" ".join(f"w{number}" for number in words))
    text = {"file": str(tmp_path / "text.txt")}
    content = {
        "model": {"name": str(tmp_path / "base"), "device": "cpu"},
        "calibration": {**text, "sequences": 4, "length": 16, "batch_size": 2},
        "evaluate": [{"name": "perplexity", "text": text, "window": 16, "batch_size": 4, "limit": 4}, "cost"],
        "prune": {"use": "pp", "ratio": 0.4},
    }
    found = Pipeline(content).measure().record
    assert found.model.architecture == type(build(family)).__name__
    assert found.metrics[0].pruned["perplexity"] != found.metrics[0].dense["perplexity"]
    assert found.ratio.units_cut > 0.3
