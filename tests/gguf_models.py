"""Small GGUF files of the architecture llama, as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

LONG = ("tokens", "token_type", "merges")


def write_gguf(path: Path, model: Any, quantised: str | None = "Q4_1", **changes: Any) -> Path:
    """``model``'s weights and a byte-level tokenizer as a GGUF; matrices are ``quantised`` or float32.

    ``changes``: metadata by its key, dots as ``__``; None leaves a key out. ``tensors`` are further ones by name.
    """
    import gguf
    from gguf.quants import quantize
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config, sizes = model.config, model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    alphabet = list(bytes_to_unicode().values())
    merges = ["t h", "Ġ th", "i n"]
    words = ["<|endoftext|>", "<|im_start|>", *alphabet, *(merge.replace(" ", "") for merge in merges)]
    words += [f"<unused{index}>" for index in range(sizes.vocab_size - len(words))]
    file_type = {None: gguf.LlamaFileType.ALL_F32, "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1}[quantised]
    found = {
        "general.architecture": "llama",
        "general.name": "small",
        "general.file_type": int(file_type),
        "llama.block_count": sizes.num_hidden_layers,
        "llama.context_length": sizes.max_position_embeddings,
        "llama.embedding_length": sizes.hidden_size,
        "llama.feed_forward_length": sizes.intermediate_size,
        "llama.attention.head_count": sizes.num_attention_heads,
        "llama.attention.head_count_kv": sizes.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": sizes.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "llama.rope.dimension_count": sizes.hidden_size // sizes.num_attention_heads,
        "llama.vocab_size": sizes.vocab_size,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(words) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }
    more = changes.pop("tensors", {})
    found |= {key.replace("__", "."): value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, found.pop("general.architecture"))
    kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
    for key, value in found.items():
        if value is not None:
            kinds[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes.num_hidden_layers)
    for source, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if source.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp rotates adjacent channels
            heads = sizes.num_attention_heads if "q_proj" in source else sizes.num_key_value_heads
            halves = values.reshape(heads, 2, -1, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        target, matrix = names.get_name(source, try_suffixes=(".weight",)), values.ndim == 2
        if matrix and quantised:
            kind = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(target, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, values)
    for name, values in more.items():
        writer.add_tensor(name, values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path
