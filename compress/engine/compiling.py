"""A decoder that torch compiles, for the passes that can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...registry import ModelError
from .call_arguments import named
from .forward_pass import ForwardPass
from .probing import CACHE_ARGUMENT
from .runtime import CompileMode
from .watching import Stages

WORTH_FROM = 32
"""Tokens of a batch: compiling takes as long for fewer, such as those of a pass that lets a model settle."""


def compile_decoder(decoder: nn.Module, mode: CompileMode, passing: ForwardPass, stages: Stages) -> Callable[[], None]:
    """Have passes of ``decoder`` without a key/value cache run compiled, pruned and dense ones; gives what undoes it.

    The hooks on the decoder itself stay outside of the graph: they count batches, look for what is not finite and take
    over what history has learnt. Passes with a cache, with gradients, in calibration, of a few tokens, or that somebody
    watches step by step or operation by operation run as they are. Raises :class:`ModelError` for a model that is
    spread over devices or offloaded, or where there is no compiler.
    """
    if any(hasattr(module, "_hf_hook") for module in decoder.modules()):
        raise ModelError(
            "runtime.compile: this model is spread over devices or offloaded, which cannot be compiled; load it on one "
            "device, or leave compile out"
        )
    check_compiler(next(decoder.parameters()).device)
    own = vars(decoder).get("forward")
    plain = decoder.forward
    compiled = torch.compile(plain, mode=mode)

    def forward(*args: Any, **kwargs: Any) -> Any:
        watched = stages.watched_now or torch._C._len_torch_dispatch_stack() > 0
        if watched or torch.is_grad_enabled() or passing.mode == "calibrate" or torch.compiler.is_compiling():
            return plain(*args, **kwargs)
        if passing.tokens < WORTH_FROM or _caches(decoder, named(decoder, args, kwargs)):
            return plain(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    decoder.forward = forward

    def undo() -> None:
        del decoder.forward
        if own is not None:  # somebody else's
            decoder.forward = own

    return undo


def check_compiler(device: torch.device) -> None:
    """Raise :class:`ModelError` where torch finds no compiler for a CPU: else its own error comes with the first batch,
    which may be hours away."""
    if device.type != "cpu":
        return
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
    except ImportError:  # torch's own affairs, which may have moved
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ModelError(
            "runtime.compile: on a CPU torch compiles through a C++ compiler and finds none; install g++, name one by "
            "the variable CXX, or leave compile out"
        ) from error


def _caches(decoder: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a pass fills or reads a key/value cache."""
    asked = arguments.get("use_cache")
    return arguments.get(CACHE_ARGUMENT) is not None or bool(decoder.config.use_cache if asked is None else asked)
