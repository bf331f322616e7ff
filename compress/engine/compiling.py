"""Compiles the decoder with torch.compile, and runs it as it is where a pass cannot be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...registry import ModelError
from ...registry.tensors.caches import cache_among
from .batch import named
from .hooks import Hooks
from .runtime import CompileMode

WORTH_FROM = 32
"""Smallest batch, in tokens, that is compiled: for a smaller one, such as a warm-up pass, compiling is not worth it."""


class CompiledForward:
    """A decoder's forward that is compiled for passes without a key/value cache, pruned and dense ones.

    What is checked and learnt when the batch has passed stays outside of the graph. Passes with a cache, with
    gradients, in calibration, of a few tokens, or that are watched step by step or operation by operation run as they
    are. Raises :class:`ModelError` for a model that is spread over devices or offloaded, or without a compiler.
    """

    def __init__(self, decoder: nn.Module, forward: Callable, mode: CompileMode, hooks: Hooks):
        if any(hasattr(module, "_hf_hook") for module in decoder.modules()):
            raise ModelError(
                "runtime.compile: this model is spread over devices or offloaded, which cannot be compiled; load it on "
                "one device, or leave compile out"
            )
        check_compiler(next(decoder.parameters()).device)
        self.decoder, self.forward, self.mode, self.hooks = decoder, forward, mode, hooks
        self._compiled = torch.compile(forward, mode=mode)

    def __reduce__(self) -> tuple:  # a copy of the model is compiled anew
        return CompiledForward, (self.decoder, self.forward, self.mode, self.hooks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shared = self.hooks.shared
        batch, watched = shared.running.batch, shared.stages.watcher is not None
        if watched or torch._C._len_torch_dispatch_stack() > 0 or torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if batch is None or batch.mode == "calibrate" or batch.shape[0] * batch.shape[1] < WORTH_FROM:
            return self.forward(*args, **kwargs)
        if _caches(self.decoder, named(self.decoder, args, kwargs)):
            return self.forward(*args, **kwargs)
        if batch.mode == "prune":
            self.hooks.refresh()
        torch.compiler.cudagraph_mark_step_begin()
        output = self._compiled(*args, **kwargs)
        for cut in self.hooks.cuts:
            cut.own_computed()
        return output


def check_compiler(device: torch.device) -> None:
    """Raise :class:`ModelError` where torch finds no compiler for a CPU: its own error would come with the first batch,
    which may be hours away."""
    if device.type != "cpu":
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # private modules of torch, which may move
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ModelError(
            "runtime.compile: on a CPU torch compiles through a C++ compiler and finds none; install g++, name one by "
            "the variable CXX, or leave compile out"
        ) from error


def _caches(decoder: Any, arguments: dict[str, Any]) -> bool:
    """Whether a pass fills or reads a key/value cache."""
    asked = arguments.get("use_cache")
    return cache_among(arguments) is not None or bool(decoder.config.use_cache if asked is None else asked)
