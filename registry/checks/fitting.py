"""The checks of scorers that fit something with the model, on a small random one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..roles.fitting import FittedScorer
from ..sites import Site
from ..tensors.model_state import ModelState
from .parts import alike, draw, expect, expect_tensor
from .toy import reorder, toy_batches, toy_model, toy_sites


def check_fit(scorer: FittedScorer) -> None:
    """It fits a finite tensor for each site, in their order, the same every time."""
    found, again = fits(scorer), fit_on(scorer, toy_model())
    for tensor, other in zip(found, again, strict=True):
        expect_tensor(tensor, scorer, "what it fits", tuple(tensor.shape))
        same = torch.equal(tensor, other)
        expect(same, scorer, "fits something else the second time; draw random numbers with torch, whose seed is set")


def check_fit_returns_model(scorer: FittedScorer) -> None:
    """Weights, buffers, hooks and forwards of the model are as before, and so is the text."""
    model, given = toy_model(), toy_batches()
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    before, classes = ModelState(model), {name: type(each) for name, each in model.named_modules()}
    try:
        fit_on(scorer, model, given)
        model.eval()  # modes and flags are put back, and so is the random state
        left = before.left()
    finally:
        before.restore()
    after = dict(model.named_parameters())
    changed = [name for name, value in values.items() if not _equal(value, after.get(name))]
    left = [f"changes {name}" for name in [*changed, *before.weights()]] + left
    left += [f"replaces {name}" for name, each in model.named_modules() if classes.get(name) is not type(each)]
    left += [f"leaves a forward at {name}" for name, each in model.named_modules() if "forward" in vars(each)]
    expect(not left, scorer, f"{left and left[0]} in fit; the model must be left as it was")
    for batch, old in zip(given, toy_batches(), strict=True):
        same = batch.keys() == old.keys() and all(torch.equal(batch[key], old[key]) for key in old)
        expect(same, scorer, "changes the text it is given in fit")


def check_fit_order(scorer: FittedScorer) -> None:
    """Where the units of a site are in another order, what is fitted follows them, and other sites keep theirs."""
    model, sites, found = toy_model(), toy_sites(), fits(scorer)
    orders = [draw(site.units, seed=40 + number).argsort() for number, site in enumerate(sites)]
    for site, units in zip(sites, orders, strict=True):
        reorder(model, site, units)
    for site, units, old, new in zip(sites, orders, found, fit_on(scorer, model), strict=True):
        expect(
            alike(new, in_order(old, site, units, site.columns(units))),
            scorer,
            f"fits by the number of a unit, or for another site: where units of layer {site.layer} {site.kind} are in "
            "another order, they get something else",
        )


def fit_on(scorer: FittedScorer, model: Any, given: Sequence[dict[str, Tensor]] | None = None) -> Sequence[Tensor]:
    """What the scorer fits with a small model, float32, as when it is pruned: with gradients on and no flag set."""
    sites = toy_sites()
    with torch.random.fork_rng([]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        found: Any = scorer.fit(model, sites, toy_batches() if given is None else given)
    model.requires_grad_(False).zero_grad(set_to_none=True)
    listed = isinstance(found, (list, tuple)) and len(found) == len(sites)
    expect(
        listed and all(isinstance(each, Tensor) for each in found),
        scorer,
        f"must return a list of {len(sites)} tensors from fit, one for each site; found {found!r:.200}",
    )
    return [each.detach().float() for each in found]


@lru_cache(maxsize=8)
def fits(scorer: FittedScorer) -> Sequence[Tensor]:
    """What the scorer fits with the small model."""
    return fit_on(scorer, toy_model())


def fitted_at(scorer: FittedScorer, site: Site, order: Tensor | None) -> Tensor:
    """What the scorer fits at a site of this kind, with the channels in ``order``."""
    place = next(number for number, each in enumerate(toy_sites()) if each.kind == site.kind)
    found = fits(scorer)[place].clone()
    return found if order is None else in_order(found, site, order[:: site.unit_size] // site.unit_size, order)


def in_order(fitted: Tensor, site: Site, units: Tensor, channels: Tensor) -> Tensor:
    """What was fitted, in another order along the dimension that has the site's units or channels."""
    for size, order in ((site.channels, channels), (site.units, units)):
        if size in fitted.shape:
            return fitted.index_select(list(fitted.shape).index(size), order)
    return fitted


def _equal(one: Tensor, other: Tensor | None) -> bool:
    return other is not None and one.shape == other.shape and torch.equal(one, other)


FITTING_CHECKS: list[Callable] = [check_fit, check_fit_returns_model, check_fit_order]
