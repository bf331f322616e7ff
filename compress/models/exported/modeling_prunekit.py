"""Causal language models whose layers differ in attention heads and MLP channels, as prunekit exports them.

The shapes of the layers are in the configuration's ``per_layer_config``, which is part of transformers. This file
needs only transformers and torch. A copy of it is in every exported folder, so that
``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` loads the weights without prunekit. If prunekit
is installed, it registers these classes, and no code from the folder runs.
"""

from __future__ import annotations

import copy
from functools import lru_cache

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


LLAMA = {
    "layers": "model.layers",
    "fields": {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "width": "intermediate_size"},
    "attention": {
        "entry": "self_attn",
        "norm": "input_layernorm",
        "producers": {"self_attn.q_proj": "heads", "self_attn.k_proj": "kv_heads", "self_attn.v_proj": "kv_heads"},
        "consumer": "self_attn.o_proj",
    },
    "mlp": {
        "entry": "mlp",
        "norm": "post_attention_layernorm",
        "producers": {"mlp.gate_proj": "width", "mlp.up_proj": "width"},
        "consumer": "mlp.down_proj",
    },
}
"""Where the blocks of a layer are, and the fields of the configuration with their sizes.

``producers``: linear layers whose rows, and ``consumer``: the one whose columns, go with heads, key/value heads or MLP
channels. ``sizes``: attributes that go with them. ``norm``: what is left out with the block; null: other blocks read
it. ``entry``: the module to replace where the block is gone; null: its linear layers are replaced.
"""

OPT = {
    "layers": "model.decoder.layers",
    "fields": {"heads": "num_attention_heads", "kv_heads": "num_attention_heads", "width": "ffn_dim"},
    "attention": {
        "entry": "self_attn",
        "norm": "self_attn_layer_norm",
        "producers": {"self_attn.q_proj": "heads", "self_attn.k_proj": "kv_heads", "self_attn.v_proj": "kv_heads"},
        "consumer": "self_attn.out_proj",
        "sizes": {"self_attn.num_heads": "heads"},
    },
    "mlp": {"entry": None, "norm": "final_layer_norm", "producers": {"fc1": "width"}, "consumer": "fc2"},
}


class PerLayerShapes(ConfigMixin):
    """A configuration with a shape for every layer: each layer can have its own values of the family's fields.

    The global values of heads, key/value heads and the MLP's width are those of the model before it was pruned. Two
    further fields mark output projections with a bias that the family does not have. ``pruned_blocks`` is as
    :data:`LLAMA`, for families whose class below does not have it.
    """

    def __post_init__(self, **kwargs):
        self.allow_global_per_layer_attribute_access = True
        self.attention_output_bias = kwargs.pop("attention_output_bias", False)
        self.mlp_output_bias = kwargs.pop("mlp_output_bias", False)
        if "pruned_blocks" in kwargs:
            self.pruned_blocks = kwargs.pop("pruned_blocks")
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """No check: after pruning, the number of heads need not divide the hidden size."""


class PerLayerModel(ModelMixin):
    """A model of the family whose layers have the shapes of the configuration."""

    blocks = LLAMA

    def __init__(self, config):
        whole = copy.copy(config)
        whole.per_layer_config = None  # the family's own code builds layers of one shape
        super().__init__(whole)
        # The constructor has set further values, such as the attention kernel.
        config.__dict__.update(whole.__dict__)
        for module in self.modules():
            if getattr(module, "config", None) is whole:
                module.config = config
        blocks = getattr(config, "pruned_blocks", self.blocks)
        for number, shape in enumerate(config.per_layer_config):
            layer = self.get_submodule(f"{blocks['layers']}.{number}")
            dense, kept = (sizes_of(sizes, blocks["fields"]) for sizes in (whole, shape))
            for kind, main in (("attention", "heads"), ("mlp", "width")):
                block = blocks.get(kind)
                if block is None or kept[main] is None or _linear(layer, block["consumer"]) is None:
                    continue  # a layer with something else there
                if kept[main]:
                    _cut(layer, block, dense, kept, main, getattr(shape, f"{kind}_output_bias"))
                else:
                    _remove(layer, block, kind)
        self.post_init()

    def init_continuous_batching(self, *args, **kwargs):
        """Refuse what generate_batch cannot do: its cache has one size for all layers."""
        fields = getattr(self.config, "pruned_blocks", self.blocks)["fields"]
        whole = sizes_of(self.config, fields)["kv_heads"]
        for number, shape in enumerate(self.config.per_layer_config):
            kv_heads = sizes_of(shape, fields)["kv_heads"]
            if kv_heads != whole:
                raise ValueError(
                    f"generate_batch and cache_implementation='paged' need {whole} key/value heads in every layer, and "
                    f"layer {number} has {kv_heads}; use generate(), or export with profile hf-uniform"
                )
        return super().init_continuous_batching(*args, **kwargs)


def sizes_of(config, fields):
    """Heads, key/value heads and MLP channels of a configuration or a layer's shape; None for what it does not say."""
    found = {name: getattr(config, field, None) if field else None for name, field in fields.items()}
    return {**found, "kv_heads": found["heads"] if found["kv_heads"] is None else found["kv_heads"]}


def _cut(layer, block, dense, kept, main, bias):
    for path, size in block["producers"].items():
        _resize(layer, path, rows=_linear(layer, path).out_features * kept[size] // dense[size])
    columns = _linear(layer, block["consumer"]).in_features * kept[main] // dense[main]
    _resize(layer, block["consumer"], columns=columns, bias=bias)
    for path, size in block.get("sizes", {}).items():
        *above, name = path.split(".")
        shares = above[-1] == "config"
        owner = layer.get_submodule(".".join(above[:-1] if shares else above))
        if shares:
            attention, owner = owner, OwnSizes(owner.config)
            attention.config = owner
        vars(owner)[name] = getattr(owner, name) * kept[size] // dense[size]
    if main == "heads":
        attention = layer.get_submodule(block["entry"])
        if hasattr(attention, "num_key_value_groups"):
            attention.num_key_value_groups = kept["heads"] // kept["kv_heads"]


class OwnSizes:
    """The configuration that all layers share, read through an object with some sizes of one layer."""

    def __init__(self, config):
        self.shared = config

    def __getattr__(self, name):
        if name == "shared" or name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.shared, name)


def _remove(layer, block, kind):
    replaced: dict[str, nn.Module] = {} if block["norm"] is None else {block["norm"]: nn.Identity()}
    returns = block.get("returns", 2 if kind == "attention" else 1)
    if block["entry"] is None:
        replaced |= {path: nn.Identity() for path in block["producers"]} | {block["consumer"]: NoMlp(returns)}
    elif kind == "attention":
        replaced[block["entry"]] = NoAttention(layer.get_submodule(block["entry"]).layer_idx, returns)
    else:
        replaced[block["entry"]] = NoMlp(returns)
    for path, module in replaced.items():
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, module)


class NoMlp(nn.Module):
    """Stands where a layer has no MLP, or one linear layer of it: adds nothing to the residual stream."""

    def __init__(self, returns=1):
        super().__init__()
        self.returns = returns

    def forward(self, hidden_states, *others, **more):
        nothing = torch.zeros_like(hidden_states)
        return nothing if self.returns == 1 else (nothing, *[None] * (self.returns - 1))


class NoAttention(NoMlp):
    """Stands where a layer has no attention: adds nothing, and counts its tokens in the key/value cache.

    transformers reads positions and masks from the first layer of the cache.
    """

    def __init__(self, layer_idx, returns=2):
        super().__init__(returns)
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *others, **more):
        for cache in (*others, *more.values()):
            if hasattr(type(cache), "get_seq_length"):
                self.count(cache.layers, hidden_states)
        return super().forward(hidden_states)

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


def _linear(layer, path):
    """A linear layer; None where the layer has none there."""
    try:
        found = layer.get_submodule(path)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Linear) else None


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


class PrunekitOPTForCausalLM(PerLayerModel, OPTForCausalLM):
    config_class = PrunekitOPTConfig
    config: PrunekitOPTConfig
    blocks = OPT


MODELS = (
    PrunekitLlamaForCausalLM,
    PrunekitMistralForCausalLM,
    PrunekitQwen2ForCausalLM,
    PrunekitQwen3ForCausalLM,
    PrunekitOPTForCausalLM,
)


@lru_cache
def config_class(base):
    """The class of such configurations for a family, by the family's own class."""
    namespace = {"model_type": f"prunekit_{base.model_type}", "__module__": __name__}
    return type(f"Prunekit{base.__name__}", (PerLayerShapes, base), namespace)


@lru_cache
def model_class(base):
    """The class of such models for a family, by the family's own class; its blocks are those of the configuration."""
    for known in MODELS:
        if base in known.__bases__:
            return known
    namespace = {"config_class": config_class(base.config_class), "__module__": __name__}
    return type(f"Prunekit{base.__name__}", (PerLayerModel, base), namespace)


def __getattr__(name):
    """The class of that name for any family of transformers: PrunekitGraniteForCausalLM, PrunekitGraniteConfig."""
    base = getattr(transformers, name.removeprefix("Prunekit"), None) if name.startswith("Prunekit") else None
    if base is None:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return config_class(base) if issubclass(base, PreTrainedConfig) else model_class(base)
