"""Reads a written GGUF file back, and compares it with what was to be written and with what llama.cpp asks of it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....registry import ModelError
from ...models.architectures import head_size
from ..cut_model import LayerShape
from ..weights import Tensors

NAME = "deci"


def checksum(values: Any) -> int:
    """CRC-32 of a NumPy array's bytes in C order."""
    return zlib.crc32(values.reshape(-1).view("uint8"))


def check_file(
    path: Path, config: Any, layers: Sequence[LayerShape], plans: Tensors, written: Mapping[str, int]
) -> None:
    """Raise :class:`ModelError` for a GGUF whose content differs from what was to be written.

    ``config`` is the dense model's, ``plans`` has the tensors by their GGUF names, ``written`` their checksums. Read
    are all sizes and lists of the layers, the tokens, and the name, shape and bytes of every tensor.
    """
    import gguf

    try:
        file = gguf.GGUFReader(path)
        found = {key: field.contents() for key, field in file.fields.items()}
    except Exception as error:  # the reader fails in many ways on a damaged file
        raise _differs(path, f"it cannot be read back ({type(error).__name__}: {error})") from error
    size, rows = head_size(config), plans["token_embd.weight"].shape[0]
    expected: dict[str, Any] = {
        "general.architecture": NAME,
        f"{NAME}.block_count": len(layers),
        f"{NAME}.embedding_length": config.hidden_size,
        f"{NAME}.feed_forward_length": [layer.width for layer in layers],
        f"{NAME}.attention.head_count": [layer.heads for layer in layers],
        f"{NAME}.attention.head_count_kv": [layer.kv_heads for layer in layers],
        f"{NAME}.attention.key_length": size,
        f"{NAME}.attention.value_length": size,
        f"{NAME}.rope.dimension_count": size,
        f"{NAME}.vocab_size": rows,
    }
    for key, value in expected.items():
        if found.get(key) != value:
            raise _differs(path, f"{key} is {found.get(key)}, not {value}")
    _check_tokens(path, found, rows)
    shapes = {tensor.name: tuple(int(side) for side in reversed(tensor.shape)) for tensor in file.tensors}
    if lost := sorted(_needed(layers) - shapes.keys()):
        raise _differs(path, f"{lost[0]} is missing")
    if shapes != {name: plan.shape for name, plan in plans.items()}:
        name = min(name for name in {*shapes, *plans} if name not in plans or shapes.get(name) != plans[name].shape)
        raise _differs(path, f"{name} has the shape {shapes.get(name)}")
    for index, layer in enumerate(layers):
        heads, kv_heads, width = layer.sizes
        for part, rows in (("attn_q", heads * size), ("attn_k", kv_heads * size), ("ffn_up", width)):
            name = f"blk.{index}.{part}.weight"
            if shapes[name] != (rows, config.hidden_size):
                raise _differs(path, f"{name} is {shapes[name]}, but the layer's sizes say {rows} rows")
    for tensor in file.tensors:
        if checksum(tensor.data) != written[tensor.name]:
            raise _differs(path, f"the values of {tensor.name} are not those that were written")


def _check_tokens(path: Path, found: Mapping[str, Any], rows: int) -> None:
    """llama.cpp stops at two tokens of one text, and at an id beyond the list."""
    tokens = found.get("tokenizer.ggml.tokens") or []
    if len(tokens) != rows or len(found.get("tokenizer.ggml.token_type") or []) != rows:
        raise _differs(path, f"it has {len(tokens)} tokens for {rows} rows of the embedding")
    if len(set(tokens)) < rows:
        double = next(token for token in tokens if tokens.count(token) > 1)
        raise _differs(path, f"two tokens have the text {double!r}")
    for key, value in found.items():
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id") and not 0 <= value < rows:
            raise _differs(path, f"{key} is {value}, beyond the {rows} tokens")


def _needed(layers: Sequence[LayerShape]) -> set[str]:
    """Names of the tensors that every model of this architecture has."""
    parts = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    blocks = {f"blk.{index}.{part}.weight" for index in range(len(layers)) for part in parts}
    return {"token_embd.weight", "output_norm.weight"} | blocks


def _differs(path: Path, what: str) -> ModelError:
    return ModelError(
        f"profile gguf: the written {path.name} is not what was to be written: {what}; check the disk and the gguf "
        "package, and export again, or use profile hf-hetero"
    )
