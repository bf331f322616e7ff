"""The checks of choosers, on made-up tensors; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LinAlgError
from ..roles.choosing import Chooser, Order
from ..roles.compensation import MemoryPlan, SiteCovariance
from .compensators import CHANNELS, some_covariance
from .parts import alike, both_kinds, draw, expect, expect_unchanged, reordered

OUTPUTS = 20


def check_order(chooser: Chooser) -> None:
    """The order has every unit once, and a finite loss that never decreases; it is the same every time.

    A covariance that cannot be solved (constant channels, rounding, few tokens) gives an order, or ``LinAlgError``.
    """
    mean = draw(CHANNELS, seed=3)
    indefinite = some_covariance() - 0.5 * some_covariance().diagonal().mean() * torch.eye(CHANNELS)
    for site in both_kinds():
        for matrix, tokens, solvable in (
            (some_covariance(), 10 * CHANNELS, True),
            (some_covariance(constant=True), 5, False),
            (torch.zeros(CHANNELS, CHANNELS), 100, False),
            (indefinite, 100, False),
        ):
            weight = draw(OUTPUTS, CHANNELS)

            def ordered(matrix: Tensor = matrix, tokens: int = tokens, weight: Tensor = weight) -> Order:
                return chooser.order(SiteCovariance(matrix.clone(), tokens, None, True, mean=mean), weight, site)  # noqa: B023

            try:
                order = ordered()
            except LinAlgError:
                expect(not solvable, chooser, "cannot solve a covariance that is positive definite")
                continue
            expect(isinstance(order, Order), chooser, f"must return an Order, found {order!r:.80}")
            flaw = order.flaw(site.units)
            expect(flaw is None, chooser, str(flaw))
            expect_unchanged(chooser, "weight", draw(OUTPUTS, CHANNELS), weight)
            again = ordered()
            same = torch.equal(order.units, again.units) and torch.equal(order.loss, again.loss)
            expect(same, chooser, "orders the same input differently; seed what draws at random")


def check_unit_order(chooser: Chooser) -> None:
    """A unit keeps its place in the order wherever it stands: it does not depend on numbers."""
    matrix, mean = some_covariance(), draw(CHANNELS, seed=3)
    for site in both_kinds():
        units, channels = reordered(site)
        weight = draw(OUTPUTS, CHANNELS)
        first, turned = (
            chooser.order(
                SiteCovariance(matrix[turn][:, turn], 10 * CHANNELS, None, True, mean=mean[turn]), weight[:, turn], site
            )
            for turn in (torch.arange(CHANNELS), channels)
        )
        same = torch.equal(units[turned.units], first.units) and alike(turned.loss.float(), first.loss.float())
        expect(same, chooser, "orders units by their numbers: where they are in another order, others go first")


def check_chooser_plan(chooser: Chooser) -> None:
    """The bytes are whole numbers."""
    for site in both_kinds():
        plan = chooser.memory_plan(site)
        expect(isinstance(plan, MemoryPlan), chooser, f"must return a MemoryPlan, found {plan!r:.80}")
        fits = all(type(size) is int and size >= 0 for size in (plan.working, plan.held))
        expect(fits, chooser, f"must plan working and held as an int of 0 or more, found {plan!r}")
        limit = plan.limit is None or (type(plan.limit) is int and plan.limit > 0)
        expect(limit, chooser, f"must plan limit as an int of at least 1, or None, found {plan.limit!r}")


CHOOSER_CHECKS = [check_order, check_unit_order, check_chooser_plan]
"""Each a function of one component."""
