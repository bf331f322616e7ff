"""Rotary embeddings for llama.cpp's ``deci``: base, linear or YaRN scaling, Llama 3's factors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ....registry import ModelError

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Values of ``rope_parameters.rope_type`` that can be written."""


def check_rope(config: Any) -> None:
    """Refuse rotary embeddings that llama.cpp's ``deci`` does not compute as transformers does.

    Raises ModelError naming the parameter and the profiles that keep it.
    """
    parameters = config.rope_parameters
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise _refusal("rope_type", kind, f"it can be {', '.join(ROPE_TYPES)}")
    part = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1.0)
    if part != 1.0:
        raise _refusal("partial_rotary_factor", part, "llama.cpp's deci rotates whole heads, 1.0")
    if kind == "yarn":
        # For deci llama.cpp uses the paper's constants, and scales attention by 0.1 ln(factor) + 1.
        usual = {
            "beta_fast": 32,
            "beta_slow": 1,
            "truncate": True,
            "mscale": None,
            "mscale_all_dim": None,
            "attention_factor": 0.1 * math.log(parameters["factor"]) + 1,
        }
        for name, expected in usual.items():
            value = parameters.get(name)
            if value is not None and (expected is None or not math.isclose(value, expected, rel_tol=1e-6)):
                raise _refusal(name, value, f"with YaRN it can be {expected or 'absent'}")


def add_rope(writer: Any, config: Any, head_dim: int) -> None:
    """Add the metadata of the rotary embeddings to a GGUF writer."""
    import gguf

    parameters = config.rope_parameters
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(parameters["factor"])
    if parameters["rope_type"] == "yarn":
        original = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)


def rope_factors(config: Any, head_dim: int) -> Tensor | None:
    """The divisors of the frequencies in Llama 3's scaling, (head_dim / 2,) float32; None for other kinds."""
    parameters = config.rope_parameters
    if parameters["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32)
    return 1.0 / parameters["rope_theta"] ** (channels / head_dim) / scaled


def _refusal(name: str, value: Any, allowed: str) -> ModelError:
    return ModelError(
        f"profile gguf: rope_parameters.{name} is {value!r}, but {allowed}; use profile hf-hetero or hf-uniform"
    )
