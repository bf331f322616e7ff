"""What measured numbers depend on: the model and the text."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor

from ...registry.tensors.windows import digest
from ..models.loading import fingerprint as model_fingerprint
from .passes import Batch

NOT_COMPUTING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""Keys of a configuration that say nothing about what the model computes."""


def fingerprint(batches: list[Batch]) -> str:
    """sha256 over ids and masks of all batches."""

    def tensors(batch: Batch) -> list[Tensor]:
        return [batch[key] for key in ("input_ids", "attention_mask") if key in batch]

    return digest(tensor for batch in batches for tensor in tensors(batch))


def origin_of(model: Any, batches: list[Batch]) -> dict[str, str]:
    """What statistics are of: sha256 of weights, configuration and token ids."""
    configuration = {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_COMPUTING}
    return {
        "model": model_fingerprint(model),
        "configuration": hashlib.sha256(json.dumps(configuration, sort_keys=True, default=str).encode()).hexdigest(),
        "text": fingerprint(batches),
    }
