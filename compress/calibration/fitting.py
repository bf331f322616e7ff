"""What scorers fit with the model: they get the plain model, gradients allowed, and it is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ...registry import FittedScorer, ModelError, NonFiniteError, PluginError
from ...registry.catalog import named
from ...registry.errors import FINITE_REMEDY
from ...registry.tensors.devices import device_of
from ..engine.engine import Engine
from ..engine.weights import ModelWatch
from .passes import Batch, Progress, differentiating, evaluating

Fits = MutableMapping[str, "tuple[Tensor, ...]"]
"""What was fitted at the sites, by the scorer, its options and the sites."""


def fit_scorer(engine: Engine, batches: Sequence[Batch], progress: Progress, known: Fits) -> None:
    """Give every site what its scorer fits on these batches.

    ``known`` has what was fitted before on this text, and gets what is new. Raises :class:`PluginError` for a scorer
    that changes the model, or returns anything but a tensor for each site, :class:`NonFiniteError` for NaN and
    infinity, :class:`ModelError` where memory runs out.
    """
    scorer = engine.strategy.scorer
    assert isinstance(scorer, FittedScorer)
    key = " ".join([scorer.identity_text, *(f"{cut.site.consumer}={cut.site.units}" for cut in engine.cuts)])
    if key not in known and engine.cuts:
        for _ in progress([scorer], f"fitting {scorer.name}", 1):
            known[key] = _fitted(engine, scorer, batches)
    for cut, tensor in zip(engine.cuts, known.get(key, ()), strict=True):
        cut.state.use_fitted(tensor.to(device_of(cut.binding.consumer)))


def _fitted(engine: Engine, scorer: FittedScorer, batches: Sequence[Batch]) -> tuple[Tensor, ...]:
    device, sites = device_of(engine.embeddings), [cut.site for cut in engine.cuts]
    given = [{key: value.to(device, copy=True) for key, value in batch.items()} for batch in batches]
    with engine.suspended(), lent(engine.model, scorer):
        try:
            found = scorer.fit(engine.model, sites, given)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"what scorer {scorer.name} fits does not fit in memory; lower calibration.batch_size, or use another "
                "scorer, such as wanda_sp"
            ) from error
    if not (isinstance(found, Sequence) and len(found) == len(sites) and all(isinstance(t, Tensor) for t in found)):
        what = f"{len(found)} parts" if isinstance(found, Sequence) else f"a {type(found).__name__}"
        raise PluginError(
            f"{named(scorer)}: fit returned {what}; it must return a list of {len(sites)} tensors, one for each site; "
            "fix the plugin"
        )
    for site, tensor in zip(sites, found, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"{site.label}: scorer {scorer.name} has fitted NaN or infinity; nothing was pruned. {FINITE_REMEDY}"
            )
    return tuple(tensor.detach().to("cpu", torch.float32, copy=True) for tensor in found)


@contextmanager
def lent(model: nn.Module, scorer: FittedScorer) -> Iterator[None]:
    """Within it a scorer has the model, with gradients on; afterwards the model is as before.

    Flags, gradients, modes and the random state are put back, hooks are removed. Raises :class:`PluginError`, which
    names the scorer, for weights, buffers, hooks or forwards that are not as before.
    """
    before, forwards = ModelWatch(model), _forwards(model)
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    failure: BaseException | None = None
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted({device.index for device in devices})))
        stack.enter_context(evaluating(model))
        stack.enter_context(differentiating(model, ()))
        stack.enter_context(torch.enable_grad())
        torch.manual_seed(0)
        try:
            yield
        except BaseException as error:
            failure = error
    left = [f"has written to {name}" for name in before.weights()] + before.left()
    replaced = sorted({name for name, *_ in _forwards(model) ^ forwards})
    left += [f"leaves another forward at {name or 'the model'}" for name in replaced]
    before.restore()
    if left and (failure is None or isinstance(failure, Exception)):
        raise PluginError(
            f"{named(scorer)}: its fit {'; '.join(left[:3])}; the model must be left as it was: load it again, and fix "
            "the plugin"
        ) from failure
    if failure is not None:
        raise failure


def _forwards(model: nn.Module) -> set[tuple[str, int, int]]:
    """What every module runs: its class, and a forward of its own."""
    return {(name, id(type(each)), id(vars(each).get("forward"))) for name, each in model.named_modules()}
