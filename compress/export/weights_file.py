"""Weights on disk: safetensors, in several files where they are large, one tensor in memory after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ...registry import SpecError
from ..output.folders import readable
from .tensors import Tensors

SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"


def check_shard_size(size: str) -> None:
    """Raise :class:`SpecError` for a size that is none."""
    _plan({}, size)


def write_weights(folder: Path, tensors: Tensors, shard_size: str = SHARD_SIZE) -> None:
    """Write model.safetensors, or shards of at most ``shard_size`` (such as "5GB") with their index.

    A shard's tensors are made when it is written, so memory holds one shard at a time.
    """
    plan = _plan(tensors, shard_size)
    for name, held in plan.filename_to_tensors.items():
        made = {key: tensors[key].make() for key in held}
        save_file(made, folder / name, {"format": "pt"})
        readable(folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plan(tensors: Tensors, shard_size: str) -> Any:
    """Which tensors go into which file."""
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        return split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.bytes,
            get_storage_id=lambda tensor: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=shard_size,
        )
    except ValueError as error:
        raise SpecError(
            f"--shard-size: {shard_size!r} is not a size ({error}); write one such as 5GB or 500MB"
        ) from None
