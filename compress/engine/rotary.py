"""Rotary embeddings whose frequencies depend on the longest text so far (dynamic, longrope): put back after use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

State = list[tuple[nn.Module, dict[str, Any], dict[str, tuple[Tensor, Tensor]]]]
"""By module: its plain attributes, and its buffers with their values."""


def rotary_state(model: nn.Module) -> State:
    """What the model's rotary embeddings hold now, for :func:`restore_rotary`."""
    return [
        (
            module,
            _attributes(module),
            {name: (kept, kept.clone()) for name, kept in module.named_buffers(recurse=False)},
        )
        for module in model.modules()
        if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
    ]


@torch.no_grad()
def restore_rotary(state: State) -> None:
    """Put back what the rotary embeddings held, bit for bit."""
    for module, attributes, buffers in state:
        for name in _attributes(module).keys() - attributes.keys():
            delattr(module, name)
        vars(module).update(attributes)
        for name, (buffer, value) in buffers.items():
            module.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@contextmanager
def rotary_kept(model: nn.Module) -> Iterator[None]:
    """Rotary embeddings are after it what they were before."""
    state = rotary_state(model)
    try:
        yield
    finally:
        restore_rotary(state)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
