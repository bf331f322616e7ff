"""vLLM's model classes for models whose layers differ in attention heads and MLP channels.

Written for the interface of vLLM 0.33.0; neither its engine nor its attention kernels have been run with them. Every
layer is one of vLLM's own classes, built from its entry in the configuration's ``per_layer_config``. vLLM does the
rest: it reads the same entries, uses the largest layer where it needs one number for the model, plans attention
separately for layers with other numbers of heads, and gives every layer KV cache pages of its own size.
"""

from __future__ import annotations

import copy
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.opt import OPTForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

from ...registry import SpecError


def layer_config(vllm_config: VllmConfig, prefix: str) -> Any:
    """The configuration of the layer that ``prefix`` names; raises :class:`SpecError` if vLLM cannot build it."""
    if not hasattr(vllm_config.model_config.model_arch_config, "per_layer_overrides"):
        raise SpecError(
            "this vLLM takes one number of heads for all layers; install vllm 0.33.0 or newer, or export the model "
            "again with --profile hf-uniform"
        )
    index = extract_layer_index(prefix)
    # A copy: the entry is the global configuration itself if no layer has values of its own.
    config = copy.copy(vllm_config.model_config.hf_config.per_layer_config[index])
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    if not (heads and width):
        raise SpecError(
            f"layer {index} has {'no MLP' if heads else 'no attention'}, which vLLM's layers cannot leave out; remove "
            "whole layers instead (strategies shortgpt and sleb), or run the folder with transformers"
        )
    ranks = vllm_config.parallel_config.tensor_parallel_size
    if heads % ranks or width % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise SpecError(
            f"layer {index} has {heads} query heads, {kv_heads} key/value heads and {width} MLP channels, which cannot "
            f"be shared by tensor_parallel_size={ranks}; set it to 1 (pipeline_parallel_size has no such limit)"
        )
    return config


def add_output_biases(layer: Any, config: Any, quant_config: Any, prefix: str) -> None:
    """Add the biases of ``config`` that vLLM's own layer lacks to the layer's output projections."""
    # vLLM skips a bias in the weights without a message if the model has no place for it.
    attention, mlp = layer.self_attn, layer.mlp
    # transformers' Qwen3 has attention_bias in the output projection too, vLLM's does not.
    if config.attention_output_bias or getattr(config, "attention_bias", False):
        attention.o_proj = _with_bias(attention.o_proj, quant_config, f"{prefix}.self_attn.o_proj")
    if config.mlp_output_bias:
        mlp.down_proj = _with_bias(mlp.down_proj, quant_config, f"{prefix}.mlp.down_proj")


def _with_bias(linear: RowParallelLinear, quant_config: Any, prefix: str) -> RowParallelLinear:
    if linear.bias is not None:
        return linear
    return RowParallelLinear(linear.input_size, linear.output_size, bias=True, quant_config=quant_config, prefix=prefix)


class LlamaLayer(LlamaDecoderLayer):
    """A decoder layer of Llama or Mistral with its own shape."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = self.config_of(vllm_config, prefix)
        super().__init__(vllm_config=vllm_config, prefix=prefix, config=config)
        add_output_biases(self, config, vllm_config.quant_config, prefix)

    def config_of(self, vllm_config: VllmConfig, prefix: str) -> Any:
        """The configuration that the layer is built from."""
        return layer_config(vllm_config, prefix)


class Qwen2Layer(LlamaLayer):
    """A decoder layer of Qwen2 with its own shape; a Llama layer, because vLLM's Qwen2 has no head_dim option."""

    def config_of(self, vllm_config: VllmConfig, prefix: str) -> Any:
        config = super().config_of(vllm_config, prefix)
        config.qkv_bias = True  # vLLM's Llama reads this, and biases queries, keys and values alone
        return config


class Qwen3Layer(Qwen3DecoderLayer):
    """A decoder layer of Qwen3 with its own shape."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = layer_config(vllm_config, prefix)
        sliding = config.layer_types[extract_layer_index(prefix)] == "sliding_attention"
        super().__init__(
            config=config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
            per_layer_sliding_window=config.sliding_window if sliding else None,
        )
        add_output_biases(self, config, vllm_config.quant_config, prefix)


class PrunekitLlamaForCausalLM(LlamaForCausalLM):
    """vLLM's Llama whose layers have their own shapes; subclasses set the layers of another family."""

    layer_class: type = LlamaLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_class)


class PrunekitMistralForCausalLM(PrunekitLlamaForCausalLM):
    """Mistral: a Llama; vLLM reads the sliding window from the configuration."""


class PrunekitQwen2ForCausalLM(PrunekitLlamaForCausalLM):
    """Qwen2: a Llama with Qwen2's layers."""

    layer_class = Qwen2Layer


class PrunekitQwen3ForCausalLM(PrunekitLlamaForCausalLM):
    """Qwen3: a Llama with Qwen3's layers."""

    layer_class = Qwen3Layer


class PrunekitOPTForCausalLM(OPTForCausalLM):
    """OPT is refused: vLLM's attention divides the hidden size by the number of heads, also after heads were cut."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        raise SpecError(
            "PrunekitOPTForCausalLM: vLLM's OPT ties heads to the hidden size and takes no shapes per layer; "
            "export the model again with --profile hf-uniform, which takes OPT with all heads kept, or --profile padded"
        )
