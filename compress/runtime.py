"""How a pruned model computes, and never what: kept units are the same whatever is set here, outputs up to rounding."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Runtime(BaseModel):
    """What is done for speed where cuts are made per batch; all of it can be switched off.

    It serves appliers that gather (``slice``). What a setting cannot be used for runs without it: gradients,
    offloaded weights, compiled code.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    column_major: bool = Field(
        True,
        description="while the model is pruned, store the consumers' weights (o_proj, down_proj, fc2) transposed, so "
        "that gathering columns copies whole rows; remove() puts them back",
    )
    shared_buffers: bool = Field(
        True, description="gather into memory that is used again, one piece for all sites of a kind; false: into new"
    )
    reuse_probe: bool = Field(
        True,
        description="on a CPU, take what q/k/v, gate/up or fc1 made of the probe's tokens as it is instead of "
        "computing it again with the batch",
    )
    fused_gather: bool = Field(
        False,
        description="on a CUDA device with Triton, read the kept rows and columns inside the matrix product instead of "
        "gathering them first",
    )
    overlap: bool = Field(
        True,
        description="on a CUDA device, learn history, and decide ahead where the selector asks for it, beside the "
        "model's own work",
    )
    compile: bool = Field(
        False, description="compile the decoder by torch.compile; passes with a key/value cache run as they are"
    )
