"""How a pruned model computes, and never what: kept units are the same whatever is set here, outputs up to rounding."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
"""torch's own names."""


class Runtime(BaseModel):
    """What is done for speed where cuts are made per batch; all of it can be switched off.

    It serves appliers that gather (``slice``). Where a setting cannot be used (gradients, offloaded weights, compiled
    code, another kind of device) the model runs without it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column_major: bool = Field(
        default=True,
        description="while the model is pruned, store the consumers' weights (o_proj, down_proj, fc2) transposed, so "
        "that gathering columns copies whole rows; remove() puts them back",
    )
    shared_buffers: bool = Field(
        default=True,
        description="gather into memory that is used again, one piece for all sites of a kind; false: into new",
    )
    reuse_probe: bool = Field(
        default=True,
        description="in small float32 batches on a CPU, take what q/k/v, gate/up or fc1 made of the probe's tokens as "
        "it is instead of computing it again with the batch",
    )
    fused_gather: bool = Field(
        default=False,
        description="on a CUDA device with Triton, read the kept rows and columns inside the matrix product instead of "
        "gathering them first",
    )
    overlap: bool = Field(
        default=True,
        description="on a CUDA device, learn history, and decide ahead where the selector asks for it, beside the "
        "model's own work",
    )
    compile: CompileMode | None = Field(
        default=None,
        description="compile the decoder by torch.compile in this mode (reduce-overhead: with CUDA graphs); passes "
        "with a key/value cache or gradients run as they are; null: do not",
    )
