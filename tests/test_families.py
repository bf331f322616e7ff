"""Every served model type, by tiny random models: what is cut equals an independent zeroing (check_family).

A new line of the table of families brings its own test. Where the general recipe does not build a tiny model of a type,
``CONFIGS`` says what differs.
"""

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.models.architectures import PRUNED
from prunekit.compress.models.likeness import types_of
from prunekit.compress.models.small import small_model
from prunekit.compress.pruning.checking import ALL, PADDINGS, STRATEGIES, UNITS, check_family, cover, randomise
from prunekit.registry import Catalog, ModelError, Producer, Rows
from prunekit.registry.checks import check_sites
from torch import nn

CATALOG = Catalog.discover(block="")
ARCHITECTURES = [entry.component() for entry in CATALOG.of_role("architectures")]
TYPES = [kind for each in ARCHITECTURES for kind in each.model_types if not kind.startswith(PRUNED)]

INSIDE = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")

WINDOW = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"])
MLA = dict(
    q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, num_key_value_heads=8,
    head_dim=None,
)  # fmt: skip
MOE = dict(
    num_experts=4, n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
    topk_group=1, n_shared_experts=1, num_shared_experts=1,
)  # fmt: skip
FIRST_DENSE = MOE | dict(first_k_dense_replace=1, mlp_layer_types=["dense", "sparse"])
GRANITE = dict(residual_multiplier=0.6, attention_multiplier=0.3, embedding_multiplier=2.0)

GPT = dict(num_key_value_heads=None, head_dim=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SSM = dict(mamba_d_state=4, mamba_d_conv=3, mamba_dt_rank=4, use_mamba_kernels=False)
LINEAR = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2, linear_num_key_heads=2,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=3,
)  # fmt: skip

CONFIGS: dict[str, dict] = {
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, num_key_value_heads=None),
    "mistral": dict(sliding_window=4),
    "qwen3": WINDOW | dict(use_sliding_window=True),
    "ministral": WINDOW,
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "vaultgemma": WINDOW,
    "cohere2": WINDOW,
    "cwm": WINDOW,
    "exaone4": WINDOW,
    "granite": GRANITE,
    "hyperclovax": GRANITE,
    "smollm3": dict(no_rope_layers=[1, 0]),
    "helium": dict(head_dim=4),
    "phi": dict(qk_layernorm=True, head_dim=4),
    "stablelm": dict(use_qkv_bias=True),
    "starcoder2": dict(use_bias=True, residual_dropout=0.0, embedding_dropout=0.0),
    "persimmon": dict(num_key_value_heads=None, head_dim=None),
    "youtu": MLA,
    "minicpm3": MLA,
    "mixtral": MOE,
    "phimoe": MOE,
    "granitemoe": MOE | GRANITE,
    "granitemoeshared": MOE | GRANITE | dict(shared_intermediate_size=24),
    "qwen2_moe": MOE | dict(shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    "qwen3_moe": MOE | dict(mlp_only_layers=[0]),
    "mellum": FIRST_DENSE | WINDOW,
    "hunyuan_v1_moe": MOE | dict(moe_topk=2),
    "dots1": FIRST_DENSE,
    "glm4_moe": FIRST_DENSE | dict(use_qk_norm=True),
    "exaone_moe": FIRST_DENSE | WINDOW,
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1, use_bias=True),
    "solar_open": MOE,
    "hy_v3": FIRST_DENSE,
    "deepseek_v3": FIRST_DENSE | MLA,
    "glm4_moe_lite": FIRST_DENSE | MLA,
    "gpt_neox": dict(num_key_value_heads=None, head_dim=None, hidden_dropout=0.0, attention_dropout=0.0),
    "gptj": GPT | dict(rotary_dim=4),
    "gpt_neo": GPT | dict(attention_types=[[["global", "local"], 1]], window_size=4, num_layers=2, num_heads=8),
    "jamba": MOE | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, **SSM),
    "qwen3_next": MOE | LINEAR | dict(shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": MOE | LINEAR | dict(shared_expert_intermediate_size=24),
    "lfm2_moe": MOE
    | dict(layer_types=["conv", "full_attention"], head_dim=None, num_dense_layers=1, use_expert_bias=False),
    "granitemoe_swa": MOE | GRANITE | WINDOW | dict(shared_intermediate_size=24),
    "lfm2": dict(layer_types=["conv", "full_attention"], head_dim=None, block_auto_adjust_ff_dim=False),
    "deepseek_v2": FIRST_DENSE | MLA | dict(num_experts_per_tok=2),
    "llama4_text": MOE | dict(intermediate_size_mlp=40, interleave_moe_layer_step=2, attention_chunk_size=4),
    "phi3": dict(head_dim=None, hidden_size=64),
    "gpt_oss": MOE | WINDOW,
    "granite_swa": GRANITE | WINDOW,
    "flex_olmo": MOE,
    "olmoe": MOE | dict(head_dim=None),
    "minimax_m2": MOE,
    "gpt2": GPT,
    "falcon": dict(num_key_value_heads=None, head_dim=None, bias=True, attention_dropout=0.0, hidden_dropout=0.0),
    "bloom": GPT | dict(hidden_dropout=0.0, attention_dropout=0.0),
    "mpt": dict(
        d_model=32,
        n_heads=8,
        n_layers=2,
        expansion_ratio=2,
        max_seq_len=64,
        hidden_size=None,
        head_dim=None,
        num_attention_heads=None,
        num_key_value_heads=None,
        num_hidden_layers=None,
    ),
    "diffllama": dict(num_key_value_heads=8, head_dim=None),
}
"""What a tiny model of a type needs besides the recipe; None leaves a value of the recipe out."""


def tiny(kind: str, **changes):
    """A tiny random model of a type."""
    return small_model(kind, **{**CONFIGS.get(kind, {}), **changes})


def served(kind: str):
    """The architecture of a model type; skips the test where the installed transformers lacks the type."""
    if kind in INSIDE:
        pytest.skip("it is inside of other models only: tests/test_towers.py")
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    (found,) = [each for each in ARCHITECTURES if kind in each.model_types]
    return found


@pytest.mark.parametrize("kind", TYPES)
def test_family(kind):
    """All 48 combinations of strategy, unit, attention and padding."""
    architecture, model = served(kind), tiny(kind).eval()
    for unit in UNITS:
        check_sites(architecture, model, unit)
    check_family(model, ALL, CATALOG)


def test_a_quarter_of_the_combinations_meets_every_strategy_under_every_padding():
    assert len(ALL) == 48 and {*cover()} < {*ALL}
    assert {(case.strategy, case.padding) for case in cover()} == set(product(STRATEGIES, PADDINGS))
    for strategy in STRATEGIES:
        mine = [case for case in cover() if case.strategy == strategy]
        assert len({case.unit for case in mine}) == len({case.attention for case in mine}) == 2


@pytest.mark.parametrize("kind", ["cohere", "glm4", "deepseek_v3"])
def test_wide_models_where_the_order_of_sums_matters(kind):
    served(kind)
    sizes = dict(hidden_size=256, intermediate_size=1600, num_attention_heads=16, num_key_value_heads=16)
    check_family(tiny(kind, **sizes), cover()[::3], CATALOG)


def test_parallel_blocks_of_stablelm():
    check_family(tiny("stablelm", use_parallel_residual=True), cover()[::4], CATALOG)


def test_latent_attention_without_a_latent_of_queries():
    served("deepseek_v3")
    check_family(tiny("deepseek_v3", q_lora_rank=None), cover()[::4], CATALOG)


# What is wrong is found.


def without_size(site):
    return replace(site, shape_attributes=())


def norm_of_the_other(site):
    return replace(site, norm=site.norm.replace("post_attention_layernorm", "input_layernorm"))


def two_parts(site):
    """Interleaved rows taken for those of all queries, then of all keys, then of all values."""
    if site.kind == "mlp":
        return site
    (producer,) = site.producers
    size = producer.segments[0].per_unit // 3
    return replace(site, producers=(Producer(producer.path, tuple(Rows(part * 32, size) for part in range(3))),))


def norm_alone(site):
    return replace(site, norm_serves_others=False)


@pytest.mark.parametrize(
    ("kind", "change", "found"),
    [
        ("stablelm", without_size, "shape"),
        ("granite", norm_of_the_other, "does not read what"),
        ("persimmon", two_parts, "off the zeroed model's"),
        ("solar_open", norm_alone, "without .* logits are"),
    ],
)
def test_a_wrong_adapter_fails(kind, change, found):
    architecture = type(served(kind))

    class Wrong(architecture):
        def sites(self, model, attention_unit):
            return [change(site) for site in super().sites(model, attention_unit)]

    others = [entry for entry in CATALOG.entries if entry.component is not architecture]
    (mine,) = [entry for entry in CATALOG.entries if entry.component is architecture]
    catalog, model = Catalog([*others, replace(mine, component=Wrong)]), tiny(kind).eval()
    with pytest.raises((AssertionError, RuntimeError), match=found):
        check_sites(Wrong(), model)
        check_family(model, cover(), catalog)


def test_layers_lack_a_site_only_where_the_architecture_says_so():
    mixtral, model = served("mixtral"), tiny("mixtral").eval()

    class WithoutExperts(type(mixtral)):
        def expert_sites(self, model, unit):
            return []

    check_sites(mixtral, model)
    check_sites(WithoutExperts(leaves="routed experts"), model)
    with pytest.raises(AssertionError, match="lists no site for layer 0 mlp, layer 1 mlp; say in leaves what"):
        check_sites(WithoutExperts(), model)


@pytest.mark.parametrize("name", ["sinks", "per_head"])
def test_weights_of_heads_that_no_cut_changes_are_refused(name):
    model = randomise(tiny("llama"))
    attention = model.model.layers[1].self_attn
    if name == "sinks":
        attention.sinks = nn.Parameter(torch.zeros(4))
    else:
        attention.per_head = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
    with pytest.raises(ModelError, match=rf"model\.layers\.1\.self_attn\.{name} has an entry for each head"):
        prune(model, "magnitude", ratio=0.4, catalog=CATALOG)


# What is listed.


def rows_of_the_page() -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    table = page.split("| model types | layers | left whole |\n|---|---|---|\n")[1].split("\n\n")[0]
    return table.splitlines()


def test_the_page_lists_the_table():
    ours = [entry for entry in CATALOG.of_role("architectures") if entry.provider.startswith("prunekit ")]
    rows = []
    for entry in ours:
        made, types = entry.component(), ", ".join(f"`{kind}`" for kind in types_of(entry))
        rows.append(f"| {types} | {made.form or 'as Llama'} | {made.leaves or '-'} |")
    assert rows_of_the_page() == rows, "the table of docs/architectures.md should be:\n" + "\n".join(rows)


def test_the_command_lists_all_types(command, tmp_path):
    code, output = command("families", "--json")
    listed = json.loads(output)
    assert code == 0 and [each["model_type"] for each in listed] == sorted(TYPES)
    assert len(listed) >= 55 and all(each["tested"] for each in listed)
    (mixtral,) = [each for each in listed if each["model_type"] == "mixtral"]
    assert mixtral["architecture"] == "mixtral" and mixtral["exports"] == [
        "hf-uniform",
        "hf-hetero",
        "padded",
        "dynamic",
    ]
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    (tmp_path / "biogpt.py").write_text(page.split("```python\n")[1].split("```")[0])
    code, output = command("families", "--plugin", tmp_path / "biogpt.py")
    assert code == 0 and f"{len(TYPES) + 1} model types" in output
    assert "biogpt two-layer MLP" in output


def test_the_page_names_all_types_without_smaller_exports(command):
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    exports = page.split("- **Exports**: only")[1].split("- **")[0]
    named = set(re.findall(r"`(\w+)`", exports)) - {"padded", "dynamic"}
    _, output = command("families", "--json")
    listed = json.loads(output)
    assert named == {each["model_type"] for each in listed if each["exports"] == ["padded", "dynamic"]}
    experts = page.split("- **Whole experts** (`reap`):")[1].split(". ")[0]
    also = set(re.findall(r"`(\w+)`", experts)) - {"hf", "dynamic"}
    assert also and also <= {each["model_type"] for each in listed if each["fewer_experts"]} & named


def test_the_family_of_the_page_takes_ten_lines(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    source = page.split("```python\n")[1].split("```")[0]
    row = source.split("import hookimpl\n\n")[1].split("\n\n\n")[0]
    assert "biogpt" not in TYPES and len(row.splitlines()) <= 10
    (tmp_path / "biogpt.py").write_text(source)
    catalog = Catalog.discover(files=[tmp_path / "biogpt.py"], block="")
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_key_value_heads=None)
    model = tiny("biogpt", **dropout).eval()
    check_sites(catalog.get("architectures", "biogpt")(), model)
    check_family(model, cover(), catalog)
    with prune(model, "magnitude", ratio=0.5, catalog=catalog) as pruned:
        pruned.save(tmp_path / "out", profile="hf-hetero")
    like_opt = {"like": "opt", "layers": "biogpt.layers"}
    with prune(model, "magnitude", ratio=0.5, catalog=CATALOG, architecture=like_opt) as pruned:
        with pytest.raises(ModelError, match="has no field ffn_dim"):
            pruned.save(tmp_path / "no", profile="hf-hetero")
