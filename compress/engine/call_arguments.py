"""What a module's forward was called with: arguments by name, and which tokens of a batch are real."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

_KNOWN: dict[type[nn.Module], tuple[str, ...]] = {}


def learn_names(*modules: nn.Module) -> None:
    """Look up the parameters of the modules' forwards beforehand: :func:`named` can then be compiled through."""
    for kind in map(type, modules):
        if kind not in _KNOWN:
            _KNOWN[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]


def named(module: nn.Module, args: tuple, kwargs: dict) -> dict:
    """A call's arguments by name, those given by position too; :func:`learn_names` has seen the module."""
    return {**dict(zip(_KNOWN[type(module)], args, strict=False)), **kwargs} if args else kwargs


def valid_tokens(attention_mask: Tensor | dict | None, batch: int, length: int) -> Tensor | None:
    """Which tokens of the batch are real, (B, T) bool; None where all are.

    The mask is (B, T) or longer by what a cache holds; or, with a static cache, already (B, 1, T, keys), one per
    kind of attention: a token is real where it may attend to itself.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    if attention_mask.dim() == 4:
        own = attention_mask[:, 0, :, :length].diagonal(dim1=1, dim2=2)
        valid = own if own.dtype == torch.bool else own == 0
    else:
        valid = attention_mask[:, -length:].bool()
    if valid.shape[1] != length or bool(valid.all()):
        return None
    return valid.expand(batch, length)
