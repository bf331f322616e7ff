"""A decoder that torch compiles, for the passes that can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..registry import ModelError
from .arguments import named
from .forward_pass import ForwardPass
from .probing import CACHE_ARGUMENT
from .runtime import CompileMode
from .stages import Stages


def compile_decoder(decoder: nn.Module, mode: CompileMode, passing: ForwardPass, stages: Stages) -> Callable[[], None]:
    """Have passes of ``decoder`` without a key/value cache run compiled, pruned and dense ones; gives what undoes it.

    The hooks on the decoder itself stay outside of the graph: they count batches, look for what is not finite and take
    over what history has learnt. Passes with a cache, with gradients, in calibration, or that somebody watches step by
    step run as they are. Raises :class:`ModelError` for a model that is spread over devices or offloaded.
    """
    if any(hasattr(module, "_hf_hook") for module in decoder.modules()):
        raise ModelError(
            "runtime.compile: this model is spread over devices or offloaded, which cannot be compiled; load it on one "
            "device, or leave compile out"
        )
    plain = decoder.forward
    compiled = torch.compile(plain, mode=mode)

    def forward(*args: Any, **kwargs: Any) -> Any:
        watched = stages.watched_now or torch.is_grad_enabled() or passing.mode == "calibrate"
        if watched or torch.compiler.is_compiling() or _caches(decoder, named(decoder, args, kwargs)):
            return plain(*args, **kwargs)
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args, **kwargs)

    decoder.forward = forward

    def undo() -> None:
        del decoder.forward

    return undo


def _caches(decoder: nn.Module, arguments: dict[str, Any]) -> bool:
    """Whether a pass fills or reads a key/value cache."""
    asked = arguments.get("use_cache")
    return arguments.get(CACHE_ARGUMENT) is not None or bool(decoder.config.use_cache if asked is None else asked)
