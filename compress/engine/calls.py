"""What is called instead of the methods of a pruned model: its decoder's forward, and ``save_pretrained``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from torch import nn

from ...registry.tensors.caches import cache_among
from .batch import named
from .copying import Unpickled
from .hooks import Hooks


def save_dense(hooks: Hooks, model: Any, own: Any, *args: Any, **kwargs: Any) -> Any:
    """``model.save_pretrained`` of a pruned model: a warning, and the dense model.

    ``own`` is the method of the instance that it replaces; None: that of the class.
    """
    warnings.warn(
        "save_pretrained writes the dense model: in place, pruning keeps all weights; pruned.save(DIR) or prunekit "
        "export writes the smaller model",
        stacklevel=2,
    )
    with hooks.shared.running.one_at_a_time.lock, hooks.turned("dense"):
        return (own or type(model).save_pretrained.__get__(model))(*args, **kwargs)


class DecoderForward(Unpickled):
    """Replaces the decoder's forward: one call is one batch. Calls from several threads run one after the other."""

    def __init__(self, decoder: nn.Module, hooks: Hooks, forward: Callable):
        update_wrapper(self, forward)  # inspect.signature then shows the decoder's own
        self.decoder, self.hooks, self.forward = decoder, hooks, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            if cache_among(named(self.decoder, args, kwargs)) is not None:
                return _uncompiled(self, args, kwargs)
            return self._run(args, kwargs)
        with self.hooks.shared.running.one_at_a_time.lock:
            return self._run(args, kwargs)

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        hooks, running = self.hooks, self.hooks.shared.running
        batch = hooks.begin(named(self.decoder, args, kwargs))
        with hooks.turned(batch.mode):
            outer = running.enter(batch)
            try:
                output = self.forward(*args, **kwargs)
                hooks.succeed(batch)
                return output
            except BaseException:
                hooks.fail(batch)
                raise
            finally:
                running.enter(outer)
                hooks.end(batch)


@torch.compiler.disable
def _uncompiled(decoder: DecoderForward, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The decoder runs as it is, within code that a user or ``generate`` compiles: the decisions lie with the cache."""
    return decoder(*args, **kwargs)
