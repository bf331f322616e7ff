"""What a model is now, noted cheaply, to see afterwards what has changed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
Hook = tuple[str, int]
"""One of :data:`HOOKS`, and torch's number of the hook in it."""


class ModelState:
    """A model's parameters, buffers, hooks and modes, and torch's own settings, as they are now.

    Values of parameters are not read: torch counts the writes to a tensor, except those through ``.data``. Buffers are
    copied, because models themselves write to them.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._tensors = {name: (tensor, _writes(tensor)) for name, tensor in model.named_parameters()}
        self._buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._hooks = {name: _hooks(module) for name, module in model.named_modules()}
        self._modes = {name: module.training for name, module in model.named_modules()}
        self._dtype, self._gradients = torch.get_default_dtype(), torch.is_grad_enabled()

    def weights(self) -> list[str]:
        """Names of the parameters and buffers that have been written to or replaced since."""
        parameters, buffers = dict(self._model.named_parameters()), dict(self._model.named_buffers())
        found = [
            name
            for name, (tensor, writes) in self._tensors.items()
            if parameters.get(name) is not tensor or _writes(tensor) != writes
        ]
        found += [name for name, before in self._buffers.items() if not _same(before, buffers.get(name))]
        return found + sorted({*parameters, *buffers} - {*self._tensors, *self._buffers})

    def added(self) -> dict[str, list[Hook]]:
        """The hooks that were added, by the name of the module.

        A module that has as many as before has none: prunekit's own may have been removed and put back.
        """
        found = {}
        for name, module in self._model.named_modules():
            now, before = _hooks(module), self._hooks.get(name, [])
            if len(now) > len(before):
                found[name] = [hook for hook in now if hook not in before][len(before) - len(now) :]
        return found

    def left(self) -> list[str]:
        """What has changed besides weights, a few words each, such as ``leaves a hook at model.norm``."""
        modes = {name: module.training for name, module in self._model.named_modules()}
        found = [f"leaves a hook at {name or 'the model'}" for name in self.added()]
        for name, training in modes.items():
            if training != self._modes.get(name, training):
                found.append(f"leaves {name or 'the model'} in {'training' if training else 'evaluation'} mode")
        if torch.get_default_dtype() != self._dtype:
            found.append(f"leaves {torch.get_default_dtype()} as torch's default dtype")
        if torch.is_grad_enabled() != self._gradients:
            found.append(f"leaves torch's gradient mode {'on' if torch.is_grad_enabled() else 'off'}")
        return found

    def restore(self) -> None:
        """Put modes and torch's settings back, and remove the hooks that were added."""
        for name, hooks in self.added().items():
            for kind, key in hooks:
                del getattr(self._model.get_submodule(name), kind)[key]
        for name, module in self._model.named_modules():
            module.training = self._modes.get(name, module.training)
        torch.set_default_dtype(self._dtype)
        torch.set_grad_enabled(self._gradients)


def _hooks(module: nn.Module) -> list[Hook]:
    """The hooks of a module, but for those of transformers, which leaves some where hidden states were asked for."""
    every = ((kind, key, hook) for kind in HOOKS for key, hook in getattr(module, kind).items())
    return [(kind, key) for kind, key, hook in every if not str(hook.__module__).startswith("transformers.")]


def _writes(tensor: Tensor) -> int:
    """How often a tensor has been written to; torch does not count it of tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def _same(one: Tensor, other: Tensor | None) -> bool:
    if other is None or one.shape != other.shape:
        return False
    return one.is_meta or other.is_meta or torch.equal(one.to(other), other)
