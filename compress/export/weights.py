"""A model's weights as a plan of tensors, each created only when it is written, and safetensors files of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ...registry import ModelError, SpecError
from ...registry.tensors.devices import stored_tensor
from ..output.folders import make_readable

SHARD_SIZE = "5GB"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """Creates its values: contiguous, on the CPU, of this shape and dtype."""

    @property
    def bytes(self) -> int:
        """Size in a file."""
        return prod(self.shape) * self.dtype.itemsize


Tensors = dict[str, PlannedTensor]
"""Tensors by their names in transformers' state dict; tied weights are there once."""


def dense_tensors(model: Any) -> Tensors:
    """A model's parameters and persistent buffers as they are, tied ones once.

    A weight counts as tied where its values are those of the other one, not where the configuration says so.
    """
    names = {name for name, _ in model.named_parameters()}  # lists a shared parameter once
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state = model.state_dict()
    left_out = parameters - names
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if {name, source} <= state.keys() and _equal(model, name, source, state):
            left_out.add(name)
    return {
        name: PlannedTensor(tuple(tensor.shape), tensor.dtype, _reader(model, name, tensor))
        for name, tensor in state.items()
        if name not in left_out
    }


def _equal(model: Any, name: str, other: str, state: dict[str, Tensor]) -> bool:
    first, second = state[name], state[other]
    if first.device.type != "meta" and first.data_ptr() == second.data_ptr():
        return True
    return torch.equal(_reader(model, name, first)(), _reader(model, other, second)())


def written(tensor: Tensor) -> Tensor:
    """``tensor`` as a file holds it: contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous()


def check_shard_size(size: str) -> None:
    """Raise :class:`SpecError` for text that is not a size."""
    _shards({}, size)


def write_weights(folder: Path, tensors: Tensors, shard_size: str = SHARD_SIZE) -> None:
    """Write model.safetensors, or shards of at most ``shard_size`` (such as "5GB") with their index.

    A shard's tensors are created when it is written, so memory holds one shard at a time.
    """
    plan = _shards(tensors, shard_size)
    for name, keys in plan.filename_to_tensors.items():
        made = {key: tensors[key].make() for key in keys}
        save_file(made, folder / name, {"format": "pt"})
        make_readable(folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Tensors, shard_size: str) -> Any:
    """The distribution of the tensors over files."""
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


def _reader(model: nn.Module, name: str, tensor: Tensor) -> Callable[[], Tensor]:
    def make() -> Tensor:
        values = stored_tensor(model, name) if tensor.device.type == "meta" else tensor
        if values is None:
            raise ModelError(f"{name} has no values to export; load the model with from_pretrained")
        return written(values)

    return make
