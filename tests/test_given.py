"""What may be given as a model: wrappers that are taken off, and those that are refused by name."""

import pytest
import torch
import transformers
from prunekit.compress import prune
from prunekit.compress.models.given import model_in
from prunekit.compress.models.loading import load
from prunekit.compress.models.source import ModelSource
from prunekit.registry import ModelError
from torch import nn


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("strategy", "ran"), [("magnitude", False), ("pp", True)])
def test_a_compiled_model_is_pruned_inside(make_model, batches, strategy, ran):
    torch._dynamo.reset()
    model, ids = make_model("llama-gqa", num_hidden_layers=1), batches[0]["input_ids"]
    dense = model(ids, use_cache=False).logits
    with prune(model, strategy, ratio=0.4, calibration=batches):
        expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    if ran:
        compiled(ids, use_cache=False)
    with prune(compiled, strategy, ratio=0.4, calibration=batches) as pruned:
        assert pruned.model is model
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, dense)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "remedy"), [("lora", r"model = model\.merge_and_unload\(\)"), ("prompt", r"model\.get_base_model\(\)")]
)
def test_adapters_of_peft_are_refused_with_the_remedy(make_model, kind, remedy):
    peft = pytest.importorskip("peft")
    config = {
        "lora": peft.LoraConfig(target_modules=["q_proj"]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[kind]
    adapted = peft.get_peft_model(make_model("llama-gqa"), config)
    for given in (adapted, torch.compile(adapted)):
        with pytest.raises(ModelError, match=rf"a Peft\w+ is a model with an adapter.*{remedy}"):
            prune(given, "magnitude", ratio=0.4)
    inside = adapted.merge_and_unload() if kind == "lora" else adapted.get_base_model()
    with prune(inside, "magnitude", ratio=0.4) as pruned:
        assert pruned.ratio.units_cut > 0.3


class FullyShardedDataParallel(nn.Module):
    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


@pytest.mark.parametrize(
    ("wrap", "inside"),
    [(nn.DataParallel, "model.module"), (FullyShardedDataParallel, "model._fsdp_wrapped_module")],
)
def test_wrappers_of_several_devices_are_named_with_what_to_pass(make_model, wrap, inside):
    with pytest.raises(ModelError) as raised:
        model_in(wrap(make_model("llama-gqa")))
    says = f"a {wrap.__name__} is a wrapper; prune the model inside it, {inside}, a LlamaForCausalLM, before"
    assert says in str(raised.value)


SIZES = dict(vocab_size=97, d_model=16, max_position_embeddings=32)
ENCODER_DECODERS = {
    "t5": lambda t: t.T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
    "bart": lambda t: t.BartConfig(**SIZES, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16),
    "whisper": lambda t: t.WhisperConfig(
        vocab_size=97,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    ),
}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_encoder_decoders_are_refused_with_the_reason(kind, tmp_path):
    config = ENCODER_DECODERS[kind](transformers)
    name = {"t5": "T5", "bart": "Bart", "whisper": "Whisper"}[kind] + "ForConditionalGeneration"
    model = getattr(transformers, name)(config)
    with pytest.raises(ModelError, match=f"{kind} is an encoder-decoder: its decoder attends to an encoder's states"):
        prune(model, "magnitude", ratio=0.4)
    config.save_pretrained(tmp_path)  # no weights: it is refused before they are read
    with pytest.raises(ModelError, match=f"{kind} is an encoder-decoder"):
        load(ModelSource(name=str(tmp_path), device="cpu"))


def test_encoders_are_refused_with_the_reason(tmp_path):
    sizes = dict(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = transformers.BertConfig(**sizes)
    with pytest.raises(ModelError, match="bert is an encoder: every token attends to later ones"):
        prune(transformers.BertForMaskedLM(config), "magnitude", ratio=0.4)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bert is an encoder"):
        load(ModelSource(name=str(tmp_path), device="cpu"))


def test_decoders_of_an_encoder_decoder_family_are_only_not_served():
    config = ENCODER_DECODERS["bart"](transformers)
    with pytest.raises(ModelError, match="no architecture serves model type 'bart'"):
        prune(transformers.BartForCausalLM(config), "magnitude", ratio=0.4)
