"""What cannot work is refused with one message that names the place, the value and the remedy."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import Catalog, DataError, ModelError, NonFiniteError, SpecError
from torch import nn


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ratio=1.0), r"0 <= ratio < 1"),
        (dict(ratio=-0.1), r"0 <= ratio < 1"),
        (dict(), r"ratio: is required"),
        (dict(ratio=0.4, skip_layers=[0, 1]), r"out of reach: with 2 of 3 layers skipped"),
        (dict(ratio=0.4, skip_layers=[7]), r"skip_layers: the model has layers 0 to 2, found 7"),
        (dict(ratio=0.4, scorrer="ppsp"), r"did you mean 'scorer'"),
        (dict(ratio=0.4, scorer="wanda-sp"), r"did you mean 'wanda_sp'"),
        (dict(ratio=0.4, scorer="magnitude"), r"uses no activations"),
        (dict(ratio=0.4, selector=None), r"both a selector and a merger"),
        (dict(ratio=0.4, sequential=True), r"decide once \(no merger\): set selector and merger to null"),
        (dict(ratio=0.4, allocator={"name": "explicit", "attention": [0], "mlp": [0]}), r"takes no ratio"),
    ],
)
def test_bad_options(make_model, batches, options, message):
    with pytest.raises(SpecError, match=message):
        prune(make_model("llama-gqa"), "pp", calibration=batches, **options)


def test_bad_calibration(make_model, batches):
    model = make_model("llama-gqa")
    with pytest.raises(DataError, match="looks at activations"):
        prune(model, "pp", ratio=0.4)
    with pytest.raises(DataError, match="empty"):
        prune(model, "pp", ratio=0.4, calibration=[])
    with pytest.raises(DataError, match="integer token ids"):
        prune(model, "pp", ratio=0.4, calibration=[torch.rand(2, 3)])
    mask = torch.zeros(4, 24)
    with pytest.raises(DataError, match="hides every token"):
        prune(model, "pp", ratio=0.4, calibration=[{**batches[0], "attention_mask": mask}])
    with pytest.raises(DataError, match="differ in shape"):
        prune(model, "pp", ratio=0.4, calibration=[{**batches[0], "attention_mask": mask[:, 1:]}])


def test_a_batch_longer_than_the_history(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        with pytest.raises(DataError, match=r"25 positions is longer than the history.* 24"):
            model(torch.ones(1, 25, dtype=torch.long))
        assert model(**batches[0]).logits.isfinite().all()
        pruned.remove()
    with prune(model, "pp", ratio=0.4, merger="probe_only"):
        assert model(torch.ones(1, 40, dtype=torch.long)).logits.isfinite().all()


def test_a_batch_that_is_not_finite(make_model, batches):
    model = make_model("llama-gqa")
    with prune(model, "pp", ratio=0.4, calibration=batches) as pruned:
        state = [h.table for h in pruned._engine.histories()]
        embeds = model.get_input_embeddings()(batches[0]["input_ids"]).clone()
        embeds[0, 3] = float("nan")
        with pytest.raises(NonFiniteError, match="layer 0 attention"):
            model(inputs_embeds=embeds)
        assert all(torch.equal(a, b.table) for a, b in zip(state, pruned._engine.histories(), strict=True))


def test_a_batch_that_is_not_finite_where_the_probe_does_not_look(make_model, batches):
    model = make_model("llama-gqa")
    options = dict(selector={"name": "random", "rows": 0.25}, skip_layers=[0, 1], trace=True)
    with prune(model, "pp", ratio=0.4 / 3, calibration=batches, **options) as pruned:
        embeds = model.get_input_embeddings()(batches[0]["input_ids"]).clone()
        expected = model(inputs_embeds=embeds, use_cache=False).logits
        looked = {row for record in pruned.trace for row in record["rows"]}
        pruned.reset()
        state = [h.table for h in pruned._engine.histories()]
        broken = embeds.clone()
        broken[next(row for row in range(4) if row not in looked), 3] = float("nan")
        with pytest.raises(NonFiniteError, match=r"layer 2 attention: .* in this batch; the history is not changed"):
            model(inputs_embeds=broken, use_cache=False)
        assert all(torch.equal(a, b.table) for a, b in zip(state, pruned._engine.histories(), strict=True))
        pruned.reset()
        assert torch.equal(model(inputs_embeds=embeds, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    "calibration", ["text", {"input_ids": torch.ones(1, 3)}, 5, [None], ["a"], [{"input_ids": "a"}]]
)
def test_calibration_that_is_none(make_model, calibration):
    with pytest.raises(DataError, match=r"calibration.*expected"):
        prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=calibration)


def test_tokens_the_model_does_not_have(make_model):
    for token in (97, -1):
        with pytest.raises(DataError, match=rf"calibration batch 0.*{token}.*97"):
            prune(make_model("llama-gqa"), "pp", ratio=0.4, calibration=[torch.tensor([[3, token]])])


def test_a_scorer_of_the_wrong_shape(make_model, batches):
    from prunekit.strategies.pp.scorer import PPsp

    class Wrong(PPsp):
        def score(self, prepared, statistic):
            return statistic[:-1]

    with pytest.raises(SpecError, match=r"score of scorer ppsp returned shape \(127,\), expected \(128,\)"):
        prune(make_model("llama-gqa"), "wanda_sp", ratio=0.4, calibration=batches, scorer=Wrong())


def test_two_architectures_for_one_model_type(make_model, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from typing import Literal\n"
        "from prunekit.compress.models.architectures import Llama\n"
        "from prunekit.registry import hookimpl\n"
        "class Mine(Llama):\n"
        '    name: Literal["mine"] = "mine"\n'
        "@hookimpl\n"
        "def architectures(): return [Mine]\n"
    )
    catalog = Catalog.discover(files=[file])
    with pytest.raises(ModelError, match=r"'llama' is served by architectures llama .* and mine .*PRUNEKIT_BLOCK"):
        prune(make_model("llama-gqa"), "magnitude", ratio=0.4, catalog=catalog)
    model = make_model("llama-gqa")
    with prune(model, "magnitude", ratio=0.4, catalog=catalog, architecture={"like": "mine"}) as pruned:
        assert pruned.counts[0, "mlp"] < 192


def test_models_that_cannot_be_cut(make_model, batches):
    import transformers

    config = transformers.CTRLConfig(n_layer=1, n_head=2, n_embd=16, dff=32, vocab_size=97)
    with pytest.raises(ModelError, match=r"no architecture serves model type 'ctrl'; prunekit families lists"):
        prune(transformers.CTRLLMHeadModel(config), "magnitude", ratio=0.4)
    with pytest.raises(ModelError, match="has post-norm layers"):
        prune(make_model("opt", do_layer_norm_before=False), "magnitude", ratio=0.4)
    with pytest.raises(ModelError, match="without wrappers"):
        prune(make_model("llama-gqa").model.layers[0].self_attn, "magnitude", ratio=0.4)
    with pytest.raises(ModelError, match="model type None"):
        prune(nn.Linear(3, 3), "magnitude", ratio=0.4)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_backbones_are_named_with_what_to_pass(make_model, batches, family):
    import transformers

    model = make_model(family)
    with pytest.raises(ModelError, match=r"backbone without an output layer: pass what AutoModelForCausalLM loads"):
        prune(model.model, "magnitude", ratio=0.4)
    whole = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    whole.model, whole.lm_head = model.model, model.lm_head
    with prune(whole, "magnitude", ratio=0.4), torch.no_grad():
        expected = whole(**batches[0], use_cache=False).logits
        assert torch.equal(model(**batches[0], use_cache=False).logits, expected)


def test_a_language_model_of_an_unknown_type_inside_another_model_is_named():
    import transformers

    text = transformers.XGLMConfig(num_layers=1, attention_heads=2, d_model=16, ffn_dim=16, vocab_size=97)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=transformers.CLIPVisionConfig(**vision, patch_size=8)
    )
    model = transformers.LlavaForConditionalGeneration(config)
    with pytest.raises(ModelError, match=r"'llava', whose language model is of type 'xglm'"):
        prune(model, "magnitude", ratio=0.4)


class Packed(torch.Tensor):
    """A weight as quantisers make them: the layer stays an nn.Linear."""


@pytest.mark.parametrize("strategy", ["magnitude", "pp"])
def test_weights_that_are_not_plain_tensors_are_refused(make_model, batches, strategy):
    model = make_model("llama-gqa")
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj\.weight is a .*Packed, not a plain tensor"):
        prune(model, strategy, ratio=0.4, calibration=batches)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_adapters_are_named_with_what_to_do(make_model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model("llama-gqa"), peft.LoraConfig(target_modules=["q_proj"])).base_model.model
    with pytest.raises(ModelError, match=r"is a peft\.tuners\.lora\.layer\.Linear.*merge_and_unload"):
        prune(model, "magnitude", ratio=0.4)


def test_a_catalog_without_architectures_says_so(make_model):
    catalog = Catalog.discover(block="architectures")
    with pytest.raises(ModelError, match="no architecture serves"):
        prune(make_model("llama-gqa"), "magnitude", ratio=0.4, catalog=catalog)
