"""Filling the channel histories: all sites in one pass over the batches, or layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import DataError, NonFiniteError
from ...registry.errors import FINITE_REMEDY
from ...registry.tensors.devices import device_of
from ..engine.engine import Engine, Learn
from ..engine.learning import calibrate as learn_statistics
from ..engine.rotary import rotary_kept
from ..engine.site_cut import SiteCut

Progress = Callable[[Iterable, str, int], Iterable]

Batch = dict[str, Tensor]


def no_progress(items: Iterable, label: str, total: int) -> Iterable:
    """The progress that shows nothing."""
    return items


@contextmanager
def one_bar(progress: Progress, times: int) -> Iterator[Progress]:
    """A progress whose one bar shows the same work done ``times`` times, with the time left until all is done."""
    bars: list[Any] = []

    def track(items: Iterable, label: str, total: int) -> Iterator:
        if not bars:
            bars.append(iter(progress(range(times * total), f"{label}, {times} times", times * total)))
        for item in items:
            next(bars[0], None)  # what the last one did is done
            yield item

    try:
        yield progress if times == 1 else track
        for bar in bars:
            next(bar, None)
    finally:
        for bar in bars:
            getattr(bar, "close", lambda: None)()


class _EnoughSeen(Exception):
    """Stops a forward pass once the layer that is calibrated has been seen."""


def calibration_list(calibration: Iterable[Any]) -> list[Batch]:
    """The user's batches as ``{"input_ids", "attention_mask"}``; raises :class:`DataError` for what is none.

    The token ids are kept, never the activations: memory does not grow with the number of sequences beyond them.
    """
    if isinstance(calibration, (str, bytes, Mapping)) or not isinstance(calibration, Iterable):
        raise DataError(
            "calibration: expected an iterable of batches, such as a list of {'input_ids': (B, T) tensor}, found "
            f"{type(calibration).__name__}"
        )
    batches = [_batch(item, number) for number, item in enumerate(calibration)]
    if not batches:
        raise DataError("calibration: the iterable is empty; give at least one batch of token ids (B, T)")
    return batches


def _batch(item: Any, number: int) -> Batch:
    place = f"calibration batch {number}"
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise DataError(f"{place}: a mapping needs the key 'input_ids', found {sorted(item)}")
        ids, mask = item["input_ids"], item.get("attention_mask")
    else:
        ids, mask = item, None
    ids = _tensor(ids, f"{place}: input_ids")
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point() or 0 in ids.shape:
        raise DataError(f"{place}: expected integer token ids of shape (B, T), found {ids.dtype} {tuple(ids.shape)}")
    batch = {"input_ids": ids.long()}
    if mask is not None:
        mask = _tensor(mask, f"{place}: attention_mask")
        mask = mask[None] if mask.dim() == 1 else mask
        if mask.shape != ids.shape:
            shapes = f"attention_mask {tuple(mask.shape)} and input_ids {tuple(ids.shape)}"
            raise DataError(f"{place}: {shapes} differ in shape")
        if not bool(mask.any()):
            raise DataError(f"{place}: the attention_mask hides every token")
        batch["attention_mask"] = mask.long()
    return batch


def _tensor(value: Any, place: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{place}: expected a tensor of integers (B, T), found {value!r:.80} ({error})") from None


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off while statistics are gathered; every module's mode is put back, and so are rotary frequencies."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with rotary_kept(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def differentiating(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it these weights have gradients, and no other parameter has; flags and gradients are restored."""
    parameters = list(model.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    wanted = {id(weight) for weight in weights}
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, (requires_grad, grad) in zip(parameters, before, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def calibrate(engine: Engine, batches: list[Batch], progress: Progress, every_mean: bool = False) -> None:
    """Fill the histories of all sites in one pass of the model over the batches.

    ``every_mean``: track the channels' mean even where nothing of this strategy reads it. Raises
    :class:`NonFiniteError` naming the first site whose activations are not finite.
    """

    def learn(cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        learn_statistics(cut.state, x, valid, every_mean)

    with engine.calibrating(learn):
        for batch in progress(batches, "calibrating", len(batches)):
            run_batch(engine, batch)
    _check_finite(engine)


def calibrate_sites(
    engine: Engine, batches: list[Batch], progress: Progress, cuts: Sequence[SiteCut], learn: Learn, label: str
) -> None:
    """Have ``learn`` look at what enters the consumers of ``cuts``; passes stop at the end of the last one's layer."""
    last = max(cut.site.layer for cut in cuts)
    with engine.calibrating(learn, cuts):
        for batch in progress(batches, label, len(batches)):
            _forward_to(engine, batch, last)


def calibrate_sequentially(
    engine: Engine,
    batches: list[Batch],
    learn: Learn,
    decide_layer: Callable[[int], None],
    progress: Progress,
    learn_dense: Learn | None = None,
) -> None:
    """Calibrate layer after layer, each on the outputs of the layers that ``decide_layer`` has already cut.

    Every batch passes each layer twice: as it is calibrated, and cut. Between layers one hidden state (B, T, D) of
    every batch is kept. With ``learn_dense`` the dense model runs along: before ``learn`` gets a batch at a site,
    ``learn_dense`` gets it as it is there in the dense model. That is a third pass through each layer, and a second
    hidden state.
    """
    layers = sorted({cut.site.layer for cut in engine.cuts})
    outputs: list[Any] = [None] * len(batches)
    """By batch: what the layer before ``reached`` returned."""
    dense_outputs: list[Any] = [None] * len(batches)
    """By batch: what the layer before ``dense_reached`` returned in the dense model."""
    reached = dense_reached = 0
    passes = ((layer, number) for layer in layers for number in range(len(batches)))
    with engine.mode_of("calibrate"):
        for layer, number in progress(passes, "calibrating", len(layers) * len(batches)):
            cuts = [cut for cut in engine.cuts if cut.site.layer == layer]
            if learn_dense is not None:  # this layer is not cut yet
                with (
                    engine.calibrating(learn_dense, cuts),
                    resumed(engine, dense_reached, dense_outputs[number]),
                    _kept(engine, layer, dense_outputs, number),
                ):
                    _forward_to(engine, batches[number], layer)
            with (
                engine.calibrating(learn, cuts),
                resumed(engine, reached, outputs[number]),
                _kept(engine, layer - 1, outputs, number),
            ):
                _forward_to(engine, batches[number], layer)
            if number == len(batches) - 1:
                reached, dense_reached = layer, layer + 1
                _check_finite(engine)
                decide_layer(layer)


@contextmanager
def _kept(engine: Engine, layer: int, outputs: list[Any], number: int) -> Iterator[None]:
    """Within it a batch leaves what a layer returns in ``outputs``; there is nothing before layer 0."""

    def hook(layer: nn.Module, args: tuple, output: Any) -> None:
        outputs[number] = output

    handle = None if layer < 0 else engine.layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


class _Passed(nn.Module):
    """Stands for a layer that a batch has passed: returns what the last such layer returned."""

    def __init__(self, layer: nn.Module, output: Any):
        super().__init__()
        vars(self).update(layer=layer, output=output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["layer"], name)


@contextmanager
def resumed(engine: Engine, reached: int, output: Any) -> Iterator[None]:
    """Within it a pass computes the layers from ``reached`` on, and the one before it has returned ``output``."""
    for number, layer in enumerate(engine.layers[:reached]):
        engine.stack[number] = _Passed(layer, output)
    try:
        yield
    finally:
        for number, layer in enumerate(engine.layers[:reached]):
            engine.stack[number] = layer


def _forward_to(engine: Engine, batch: Batch, layer: int) -> None:
    """One pass that stops at the end of a layer."""
    handle = engine.layers[layer].register_forward_hook(partial(_stop, engine))
    try:
        run_batch(engine, batch)
    except _EnoughSeen:
        pass
    finally:
        handle.remove()


def _stop(engine: Engine, layer: torch.nn.Module, args: tuple, output: Any) -> None:
    batch = engine.shared.running.batch
    if batch is not None:
        engine.hooks.check_read(batch)
    raise _EnoughSeen


@torch.no_grad()
def run_batch(engine: Engine, batch: Batch) -> None:
    """One pass through the decoder: neither calibrating nor deciding needs logits."""
    device = device_of(engine.embeddings)
    engine.decoder(**{key: value.to(device) for key, value in batch.items()}, use_cache=False)


def _check_finite(engine: Engine) -> None:
    for cut in engine.cuts:
        for tensor in (cut.history.table, cut.history.mean):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteError(
                    f"{cut.site.label}: NaN or infinity in the activations that enter {cut.site.consumer} during "
                    f"calibration, or in the weights before it; nothing was pruned. {FINITE_REMEDY}"
                )
