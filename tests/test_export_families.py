"""Smaller models of every family: written, loaded by transformers, and equal; or refused by name."""

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.export.family import Family
from prunekit.compress.export.support import profiles_for
from prunekit.compress.models.exported import classes
from prunekit.compress.pruning.sites import find_sites
from prunekit.registry import ModelError, SizeFields, SpecError

from tests.family_checks import randomise
from tests.test_families import CATALOG, INSIDE, TYPES, served, tiny

UNWRITTEN = (
    "dots1 glm4_moe exaone_moe ernie4_5_moe solar_open hy_v3 deepseek_v3 deepseek_v2 glm4_moe_lite llama4_text gptj "
    "gpt_neo gpt_oss granitemoe_swa granite_swa olmo2 olmo3 flex_olmo olmoe minimax_m2 gpt2 falcon bloom mpt diffllama"
)
WITHOUT_FIELDS = dict.fromkeys(UNWRITTEN.split(), "names no fields of the configuration that hold the sizes")
OTHER_WIDTHS = WITHOUT_FIELDS | dict.fromkeys(
    ["qwen2_moe", "qwen3_next"], "shared_expert_intermediate_size is 24, and layer 0 mlp has 48 units"
)
REFUSED = {
    "hf-hetero": OTHER_WIDTHS,
    "hf-uniform": OTHER_WIDTHS
    | {
        "gpt_neox": r"4 of 8 heads.*ties heads to the hidden size; nearest: --profile hf-hetero",
        "jamba": r"experts.gate_up_proj is .* was expected; nearest: --profile hf-hetero",
        "helium": r"4 of 8 heads.*ties heads to the hidden size; nearest: --profile hf-hetero",
        "hunyuan_v1_moe": r"gate_up_proj is .* was expected; nearest: --profile hf-hetero",
        "opt": r"4 of 8 heads.*ties heads to the hidden size; nearest: --profile hf-hetero",
        "persimmon": r"4 of 8 heads.*ties heads to the hidden size; nearest: --profile hf-hetero",
        "stablelm": r"4 of 8 heads.*ties heads to the hidden size; nearest: --profile hf-hetero",
    },
}
"""What a profile says of the tiny model of a type that it cannot hold."""

STEPS = dict(max_new_tokens=3, do_sample=False, eos_token_id=None)


def uneven(model):
    """Shares for every layer: one without its attention, one without its MLP, where the family has sites for them."""
    places = {(site.layer, site.kind) for site in find_sites(model, CATALOG, "kv_group", "keep")[1]}
    whole = len(places) == 4
    wanted = {"attention": [1.0 if whole else 0.5, 0.25], "mlp": [0.3, 1.0 if whole else 0.6]}
    shares = {
        kind: [share if (layer, kind) in places else 0 for layer, share in enumerate(found)]
        for kind, found in wanted.items()
    }
    return {"ratio": None, "allocator": {"name": "explicit", **shares}}


@torch.no_grad()
@pytest.mark.parametrize("profile", ["hf-hetero", "hf-uniform"])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind not in INSIDE])
def test_a_smaller_model_reloads_with_equal_logits(kind, profile, tmp_path):
    served(kind)
    changes = {"phi": dict(qk_layernorm=False), "youtu": dict(tie_word_embeddings=False)}  # the second is not read back
    model = randomise(tiny(kind, **changes.get(kind, {})))
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    options = uneven(model) if profile == "hf-hetero" else {"ratio": 0.5}
    assert (profile in profiles_for(kind, served(kind))) == (kind not in WITHOUT_FIELDS)
    with prune(model, "magnitude", catalog=CATALOG, experts="keep", **options) as pruned:
        if kind in REFUSED[profile]:
            with pytest.raises((SpecError, ModelError), match=REFUSED[profile][kind]):
                pruned.save(tmp_path / "out", profile=profile)
            assert not (tmp_path / "out").exists()
            return
        pruned.save(tmp_path / "out", profile=profile)
        logits, tokens = model(ids).logits, model.generate(ids, **STEPS)
    if profile == "hf-hetero":
        classes.register(kind)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(again(ids).logits, logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(again.generate(ids, **STEPS), tokens)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma2", r"Gemma2Config allows 2, 4, 8 of 8 query heads .* 6 were to be kept; nearest: --profile hf-hetero"),
        ("arcee", r"ArceeConfig allows 2, 4, 8 of 8 .*cut MLPs alone, .*explicit, attention: \[0, 0\]"),
        ("phi", r"q_layernorm.weight is \(4,\), and \(5,\) was expected; nearest: --profile hf-hetero"),
        ("granite", None),
    ],
)
def test_head_counts_that_do_not_divide_the_hidden_size(kind, said, tmp_path):
    served(kind)
    with prune(randomise(tiny(kind)), "magnitude", catalog=CATALOG, ratio=0.25) as pruned:
        if said is None:
            pruned.save(tmp_path / "out", profile="hf-uniform")
            return
        with pytest.raises((SpecError, ModelError), match=said):
            pruned.save(tmp_path / "out", profile="hf-uniform")
    assert not (tmp_path / "out").exists()


def test_tensors_of_all_heads_have_no_smaller_form(tmp_path):
    model = randomise(tiny("cohere", use_qk_norm=True))
    with prune(model, "magnitude", ratio=0.5, catalog=CATALOG) as pruned:
        with pytest.raises(SpecError, match=r"q_norm\.weight belongs to all heads.*--profile padded"):
            pruned.save(tmp_path / "out", profile="hf-uniform")
    assert not (tmp_path / "out").exists()


def test_conv1d_layers_have_one_shape():
    fields = SizeFields(kv_heads=None, head_size=None, width="n_inner")
    architecture = served("gpt2").model_copy(update={"sizes": fields})
    family = Family(tiny("gpt2", n_inner=48).config, architecture, CATALOG)
    assert family.refusal("hf-uniform") is None
    assert "is a Conv1D, and layers of different shapes are of nn.Linear alone" in family.refusal("hf-hetero")
