"""Statistics of the weights of every decoder layer, for allocators.

Letters: O outputs and I inputs of a linear layer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import MutableMapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import LayerWeight, NonFiniteError
from ...registry.errors import FINITE_REMEDY
from ...registry.tensors.devices import weights_present
from ...registry.tensors.linears import is_linear, matrix_of
from ..engine.engine import Engine
from .passes import Batch, Progress, run_batch

Linears = dict[int, dict[str, nn.Linear]]
"""Linear layers by their decoder layer and by their path within it."""


def describe_weights(
    engine: Engine, batches: Sequence[Batch] | None, known: MutableMapping[str, float], progress: Progress
) -> None:
    """Give every site what the allocator asks for of the weights of its decoder layer.

    ``known`` has what was measured before of this model, on this text, and gets what is new. Raises
    :class:`NonFiniteError` for a layer whose statistic is not finite.
    """
    statistic = engine.strategy.allocator.weight_statistic
    if statistic is None or not engine.cuts:
        return
    layers = sorted({cut.site.layer for cut in engine.cuts})
    keys = {layer: f"{statistic.identity_text} layer {layer}" for layer in layers}
    missing = [layer for layer in layers if keys[layer] not in known]
    if missing:
        linears = {layer: _linears(engine.layers[layer]) for layer in missing}
        norms = _input_norms(engine, batches or [], linears, progress) if statistic.uses_inputs else {}
        for layer in progress(missing, f"measuring weights, {statistic.name}", len(missing)):
            weights = [
                LayerWeight(path, partial(_weight, linear), *([norms[linear]] if norms else []))
                for path, linear in linears[layer].items()
            ]
            value = statistic.measure(weights)
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"layer {layer}: {statistic.name} of the weights of this layer is NaN or infinite; nothing was "
                    f"pruned. {FINITE_REMEDY}"
                )
            known[keys[layer]] = float(value)
    for cut in engine.cuts:
        cut.state.describe_weights(known[keys[cut.site.layer]])


def _linears(layer: nn.Module) -> dict[str, nn.Linear]:
    return {path: module for path, module in layer.named_modules() if is_linear(module)}


def _weight(linear: nn.Linear) -> Tensor:
    with weights_present(linear):
        return matrix_of(linear).detach().float()


def _input_norms(
    engine: Engine, batches: Sequence[Batch], linears: Linears, progress: Progress
) -> dict[nn.Module, Tensor]:
    """L2 norm of every input (I,) of every linear layer over all real tokens, in one pass of the dense model."""
    squares: dict[nn.Module, Tensor | float] = defaultdict(float)

    def see(linear: nn.Module, args: tuple[Any, ...]) -> None:
        batch = engine.shared.running.batch
        assert batch is not None  # the decoder is running
        valid = batch.valid_on(args[0].device)
        tokens = args[0].reshape(*batch.shape, -1)
        real = tokens.flatten(0, 1) if valid is None else tokens[valid]
        squares[linear] = squares[linear] + real.float().square().sum(0)

    with ExitStack() as stack:
        stack.enter_context(engine.calibrating(lambda *_: None, ()))
        for linear in (linear for layer in linears.values() for linear in layer.values()):
            stack.callback(linear.register_forward_pre_hook(see).remove)
        for batch in progress(batches, "measuring inputs", len(batches)):
            run_batch(engine, batch)
    return {linear: torch.as_tensor(total).sqrt() for linear, total in squares.items()}
