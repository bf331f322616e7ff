"""A model's weights as a plan of tensors, each created only when it is written, and safetensors files of them."""

from __future__ import annotations

import copy
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
from ...registry.tensors.experts import experts_in
from ..models.architectures import PRUNED
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


Publish = Callable[[str, Tensor], dict[str, Tensor]]
"""Turns a tensor of transformers' state dict into those of a checkpoint, by their names."""


def published(model: Any) -> Publish | None:
    """How checkpoints on the hub hold the tensors of a model with routed experts; None: as the state dict does.

    transformers joins the experts of a layer in one tensor. Checkpoints, and other tools that read them, have a tensor
    for each expert.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    if model.config.model_type.startswith(PRUNED) or not experts_in(model):
        return None
    with torch.device("meta"):
        fresh = type(model)(copy.deepcopy(model.config))
    # A prefix is taken off where a checkpoint has one; the state dict has none.
    rules = [
        rule for rule in get_model_conversion_mapping(fresh, add_legacy=False) if type(rule).__name__ != "PrefixChange"
    ]
    if not rules or any(len(rule.target_patterns) > 1 for rule in rules):
        return None  # where several tensors make one of the checkpoint, they may be in different shards
    fresh._weight_conversions = rules

    def publish(name: str, tensor: Tensor) -> dict[str, Tensor]:
        found = revert_weight_conversion(fresh, {name: tensor})
        return {key: part.contiguous().clone() for key, part in found.items()}

    return publish


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


def write_weights(folder: Path, tensors: Tensors, shard_size: str = SHARD_SIZE, publish: Publish | None = None) -> None:
    """Write model.safetensors, or shards of at most ``shard_size`` (such as "5GB") with their index.

    A shard's tensors are created when it is written, so memory holds one shard at a time. ``publish`` turns each into
    those that the file holds.
    """
    plan, places = _shards(tensors, shard_size), dict[str, str]()
    for name, keys in plan.filename_to_tensors.items():
        made = {key: tensors[key].make() for key in keys}
        if publish is not None:
            made = {new: part for key, tensor in made.items() for new, part in publish(key, tensor).items()}
        places |= dict.fromkeys(made, name)
        save_file(made, folder / name, {"format": "pt"})
        make_readable(folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": places}
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
