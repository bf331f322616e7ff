"""Causal language models whose layers differ in attention heads and MLP channels, as prunekit exports them.

The shapes of the layers are in the configuration's ``per_layer_config``, which is part of transformers. This file
needs only transformers and torch. A copy of it is in every exported folder, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads the weights without prunekit. If prunekit
is installed, it registers these classes, and no code from the folder runs.
"""

from __future__ import annotations

import copy

import torch
import transformers
from torch import nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

OLDEST = "5.14"
"""The first transformers whose configurations have per_layer_config."""

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError(
        f"models with layers of different shapes need transformers {OLDEST} or newer, this is "
        f"{transformers.__version__}; install a newer one, or export the model again as hf-uniform"
    )


TYPE_CHECKING = False  # type checkers read it as true
if TYPE_CHECKING:
    ConfigMixin = PreTrainedConfig

    class ModelMixin(PreTrainedModel, GenerationMixin): ...

else:
    ConfigMixin = ModelMixin = object


class PerLayerShapes(ConfigMixin):
    """A configuration with a shape for every layer: each layer can have its own values of the family's fields.

    The global values of ``num_attention_heads``, ``num_key_value_heads`` and the MLP's width are those of the model
    before it was pruned. Two further fields mark output projections with a bias that the family does not have.
    """

    width = "intermediate_size"
    """The field with the number of MLP channels."""

    def __post_init__(self, **kwargs):
        self.allow_global_per_layer_attribute_access = True
        self.attention_output_bias = kwargs.pop("attention_output_bias", False)
        self.mlp_output_bias = kwargs.pop("mlp_output_bias", False)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """No check: after pruning, the number of heads need not divide the hidden size."""


class PerLayerModel(ModelMixin):
    """A model of the family whose layers have the shapes of the configuration."""

    attention_output = "self_attn.o_proj"
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    mlp_output = "mlp.down_proj"
    attention_norm, mlp_norm = "input_layernorm", "post_attention_layernorm"

    def __init__(self, config):
        whole = copy.copy(config)
        whole.per_layer_config = None  # the family's own code builds layers of one shape
        super().__init__(whole)
        # The constructor has set further values, such as the attention kernel.
        config.__dict__.update(whole.__dict__)
        for module in self.modules():
            if getattr(module, "config", None) is whole:
                module.config = config
        for layer, shape in zip(self.get_decoder().layers, config.per_layer_config, strict=True):
            self._cut(layer, shape)
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse what generate_batch cannot do: its cache has one size for all layers."""
        whole = kv_heads_of(self.config)
        for number, shape in enumerate(self.config.per_layer_config):
            if kv_heads_of(shape) != whole:
                raise ValueError(
                    f"generate_batch and cache_implementation='paged' need {whole} key/value heads in every layer, and "
                    f"layer {number} has {kv_heads_of(shape)}; use generate(), or export with profile hf-uniform"
                )
        return super().init_continuous_batching(*args, **kwargs)

    def _cut(self, layer, shape):
        if shape.num_attention_heads:
            self._cut_attention(layer, shape)
        else:
            setattr(layer, self.attention_norm, nn.Identity())
            layer.self_attn = NoAttention(layer.self_attn.layer_idx)
        if getattr(shape, shape.width):
            self._cut_mlp(layer, shape)
        else:
            setattr(layer, self.mlp_norm, nn.Identity())
            self._remove_mlp(layer)

    def _cut_attention(self, layer, shape):
        attention, heads = layer.self_attn, shape.num_attention_heads
        kv_heads, size = kv_heads_of(shape), attention.head_dim
        _resize(layer, "self_attn.q_proj", rows=heads * size)
        for name in ("self_attn.k_proj", "self_attn.v_proj"):
            _resize(layer, name, rows=kv_heads * size)
        _resize(layer, self.attention_output, columns=heads * size, bias=shape.attention_output_bias)
        if hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups = heads // kv_heads
        else:
            attention.num_heads = heads

    def _cut_mlp(self, layer, shape):
        width = getattr(shape, shape.width)
        for name in self.mlp_inputs:
            _resize(layer, name, rows=width)
        _resize(layer, self.mlp_output, columns=width, bias=shape.mlp_output_bias)

    def _remove_mlp(self, layer):
        layer.mlp = NoMlp()


class NoMlp(nn.Module):
    """Stands where a layer has no MLP, or one linear layer of it: adds nothing to the residual stream."""

    def forward(self, x):
        return torch.zeros_like(x)


class NoAttention(nn.Module):
    """Stands where a layer has no attention: adds nothing, and counts its tokens in the key/value cache.

    transformers reads positions and masks from the first layer of the cache.
    """

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **others):
        if past_key_values is not None:
            self.count(past_key_values.layers, hidden_states)
        return torch.zeros_like(hidden_states), None

    def count(self, layers, states):
        while len(layers) <= self.layer_idx:
            layers.append(DynamicLayer())
        here = layers[self.layer_idx]
        if isinstance(here, DynamicLayer) and not (here.is_sliding or isinstance(here, TokenCount)):
            here = layers[self.layer_idx] = TokenCount()
        heads, size = (1, 0) if here.keys is None else here.keys.shape[1::2]
        nothing = states.new_zeros(len(states), heads, states.shape[1], size)
        here.update(nothing, nothing)


class TokenCount(DynamicLayer):
    """A layer of a key/value cache that has the number of its tokens, and neither keys nor values."""

    def get_seq_length(self):
        return 0 if self.keys is None else self.keys.shape[-2]


def kv_heads_of(shape):
    """Key/value heads of a configuration or a layer's shape."""
    return getattr(shape, "num_key_value_heads", shape.num_attention_heads)


def _resize(layer, path, rows=None, columns=None, bias=False):
    """Replace a linear layer by one of another shape, unless it has that shape."""
    owner, _, name = path.rpartition(".")
    owner = layer.get_submodule(owner)
    old = getattr(owner, name)
    rows, columns, bias = rows or old.out_features, columns or old.in_features, bias or old.bias is not None
    if (rows, columns, bias) != (old.out_features, old.in_features, old.bias is not None):
        setattr(owner, name, nn.Linear(columns, rows, bias, device=old.weight.device, dtype=old.weight.dtype))


class PrunekitLlamaConfig(PerLayerShapes, LlamaConfig):
    model_type = "prunekit_llama"


class PrunekitLlamaForCausalLM(PerLayerModel, LlamaForCausalLM):
    config_class = PrunekitLlamaConfig
    config: PrunekitLlamaConfig


class PrunekitMistralConfig(PerLayerShapes, MistralConfig):
    model_type = "prunekit_mistral"


class PrunekitMistralForCausalLM(PerLayerModel, MistralForCausalLM):
    config_class = PrunekitMistralConfig
    config: PrunekitMistralConfig


class PrunekitQwen2Config(PerLayerShapes, Qwen2Config):
    model_type = "prunekit_qwen2"


class PrunekitQwen2ForCausalLM(PerLayerModel, Qwen2ForCausalLM):
    config_class = PrunekitQwen2Config
    config: PrunekitQwen2Config


class PrunekitQwen3Config(PerLayerShapes, Qwen3Config):
    model_type = "prunekit_qwen3"


class PrunekitQwen3ForCausalLM(PerLayerModel, Qwen3ForCausalLM):
    config_class = PrunekitQwen3Config
    config: PrunekitQwen3Config


class PrunekitOPTConfig(PerLayerShapes, OPTConfig):
    model_type = "prunekit_opt"
    width = "ffn_dim"


class PrunekitOPTForCausalLM(PerLayerModel, OPTForCausalLM):
    config_class = PrunekitOPTConfig
    config: PrunekitOPTConfig
    attention_output = "self_attn.out_proj"
    mlp_inputs = ("fc1",)
    mlp_output = "fc2"
    attention_norm, mlp_norm = "self_attn_layer_norm", "final_layer_norm"

    def _remove_mlp(self, layer):
        layer.fc1, layer.fc2 = nn.Identity(), NoMlp()


MODELS = (
    PrunekitLlamaForCausalLM,
    PrunekitMistralForCausalLM,
    PrunekitQwen2ForCausalLM,
    PrunekitQwen3ForCausalLM,
    PrunekitOPTForCausalLM,
)
