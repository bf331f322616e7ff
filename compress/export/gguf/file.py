"""A GGUF file of architecture ``deci``: every layer with its own head counts and MLP width, for llama.cpp.

llama.cpp's Llama architectures share one graph, but only ``deci`` reads the three sizes as one list per layer and
takes a bias on every projection. Its attention is plain causal attention with full rotary embeddings, so it also
computes Mistral without a sliding window, and Qwen2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....registry import ModelError, SpecError
from ....registry.tensors.tokens import context_of
from ...models.architectures import head_size
from ..configs import check_whole, window_in_force
from ..cut_model import LayerShape
from ..weights import PlannedTensor, Tensors
from .checking import check_file, checksum
from .rope import add_rope, check_rope, rope_factors
from .tokenizer import Vocabulary, read_vocabulary

MODEL_TYPES = ("llama", "mistral", "qwen2")
"""The model types of transformers that ``deci`` computes."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of matrices."""


CONVERT = "hf-hetero, or with hf-uniform and convert that folder with llama.cpp's convert_hf_to_gguf.py"


def check_supported(config: Any, instead: str = CONVERT) -> None:
    """Refuse models that llama.cpp's ``deci`` does not compute, by the dense model's transformers config.

    ``instead`` is what can write a family that it does not compute.
    Raises ModelError naming the unsupported part and another profile, SpecError if ``gguf`` is not installed.
    """
    _gguf()
    kind = config.model_type
    if kind not in MODEL_TYPES:
        why = "llama.cpp's deci has no norm on queries and keys" if kind == "qwen3" else "llama.cpp's deci is a Llama"
        raise ModelError(
            f"profile gguf: {kind} models cannot be written ({why}); {', '.join(MODEL_TYPES)} can. Export {kind} with "
            f"profile {instead}"
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ModelError(
            f"profile gguf: hidden_act is {config.hidden_act!r}, but llama.cpp's deci computes silu; "
            "use profile hf-hetero or hf-uniform"
        )
    if window_in_force(config):
        window = config.sliding_window
        raise ModelError(
            f"profile gguf: attention is limited to a sliding window of {window} positions (sliding_window), which "
            "llama.cpp's deci does not have; use profile hf-hetero or hf-uniform, or set sliding_window to null in "
            f"config.json and keep contexts up to {window} tokens"
        )
    check_rope(config)


def write_gguf(
    path: Path, config: Any, layers: Sequence[LayerShape], tensors: Tensors, tokenizer: Any, *, name: str
) -> tuple[str, ...]:
    """Write a cut model and its tokenizer as one GGUF file, one tensor at a time.

    ``config`` is the dense model's, ``tensors`` are cut already. Returns the differences from transformers in the
    splitting of text, one sentence each. Raises ModelError for what GGUF cannot hold, before the file is opened, and
    for a file that differs from what was to be written when it is read back.
    """
    check_supported(config)
    gguf = _gguf()
    check_layers(layers)
    plans = _plans(config, layers, tensors)
    vocabulary = read_vocabulary(tokenizer, rows=tensors["model.embed_tokens.weight"].shape[0])

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.DECI])
    _add_metadata(writer, config, layers, tensors, vocabulary, name)
    vocabulary.add_to(writer, config)
    for target, plan in plans.items():
        writer.add_tensor_info(
            target, plan.shape, _numpy(torch.empty(0, dtype=plan.dtype)).dtype, plan.bytes, _ggml_type(plan.dtype)
        )
    written: dict[str, int] = {}
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for target, plan in plans.items():
            values = _numpy(plan.make())
            written[target] = checksum(values)
            writer.write_tensor_data(values)
            del values  # one tensor is in memory at a time
    finally:
        writer.close()
    check_file(path, config, layers, plans, written)
    return vocabulary.notes


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Query or key rows (heads * head_dim, ...) with the two halves of each head interleaved.

    transformers rotates channel i with channel i + head_dim / 2; llama.cpp's ``deci`` rotates adjacent channels.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _add_metadata(
    writer: Any, config: Any, layers: Sequence[LayerShape], tensors: Tensors, vocabulary: Vocabulary, name: str
) -> None:
    gguf = _gguf()
    file_types = {
        torch.float32: gguf.LlamaFileType.ALL_F32,
        torch.float16: gguf.LlamaFileType.MOSTLY_F16,
        torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
    }
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_types[tensors["model.layers.0.self_attn.q_proj.weight"].dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(layers))
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length([layer.width for layer in layers])
    writer.add_head_count([layer.heads for layer in layers])
    writer.add_head_count_kv([layer.kv_heads for layer in layers])
    # Without these llama.cpp divides the hidden size by the number of heads of the first layer, which was cut.
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary.tokens))
    add_rope(writer, config, head_size(config))


def _plans(config: Any, layers: Sequence[LayerShape], tensors: Tensors) -> Tensors:
    """The tensors by their GGUF names, in the layout and dtypes of llama.cpp."""
    gguf = _gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DECI, len(layers))
    head_dim = head_size(config)
    plans: Tensors = {}
    for source, plan in tensors.items():
        target = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ModelError(
                f"profile gguf: {source} has no place in llama.cpp's deci architecture; use profile hf-hetero"
            )
        if plan.dtype not in DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ModelError(f"profile gguf: {source} is {plan.dtype}; load the model in one of {kinds}")
        make = plan.make
        if source.rsplit(".", 2)[-2] in ("q_proj", "k_proj"):
            make = _then(make, lambda rows: interleaved(rows, head_dim))
        if len(plan.shape) == 1:  # llama.cpp adds and multiplies vectors in float32 only
            make = _then(make, Tensor.float)
            plans[target] = PlannedTensor(plan.shape, torch.float32, make)
        else:
            plans[target] = PlannedTensor(plan.shape, plan.dtype, make)
    factors = rope_factors(config, head_dim)
    if factors is not None:
        plans["rope_freqs.weight"] = PlannedTensor(tuple(factors.shape), torch.float32, lambda: factors)
    return plans


def _then(make: Callable[[], Tensor], change: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: change(make())


def check_layers(layers: Sequence[LayerShape]) -> None:
    """Raise :class:`SpecError` or :class:`ModelError` for shapes that llama.cpp does not take."""
    check_whole("gguf", layers)
    for index, layer in enumerate(layers):
        heads, kv_heads, width = layer.sizes
        if kv_heads < 1 or heads % kv_heads or width < 1:
            raise ModelError(
                f"profile gguf: layer {index} has {heads} query heads, {kv_heads} key/value heads and "
                f"{width} MLP channels; llama.cpp needs at least one of each and query heads that are a "
                "multiple of the key/value heads. Prune whole key/value groups (attention_unit: kv_group)"
            )


def _numpy(tensor: Tensor) -> Any:
    # NumPy has no bfloat16; GGUF needs only its bytes.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _ggml_type(dtype: torch.dtype) -> Any:
    types = _gguf().GGMLQuantizationType
    return {torch.float32: types.F32, torch.float16: types.F16, torch.bfloat16: types.BF16}[dtype]


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise SpecError("profile gguf needs the gguf package: pip install gguf") from error
    return gguf
