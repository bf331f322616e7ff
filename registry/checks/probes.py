"""The checks of probe selectors and history mergers, on made-up tensors; :mod:`prunekit.registry.checks` runs them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..roles.parts import HistoryMerger, ProbeSelector
from ..sites import Site
from .parts import alike, both_kinds, draw, expect, expect_tensor, expect_unchanged, reordered


def padding_masks(batch: int, length: int) -> Iterator[Tensor | None]:
    """No padding, right, left, and all tokens but one."""
    yield None
    lengths = torch.arange(batch)[:, None] % length + 1
    places = torch.arange(length)
    yield places < lengths
    yield places >= length - lengths
    lonely = torch.zeros(batch, length, dtype=torch.bool)
    lonely[-1, -1] = True
    yield lonely


def check_selection(selector: ProbeSelector) -> None:
    """Rows and positions are int64, ascending, unique, in range and not empty, for batches of any shape."""
    for batch, length in ((1, 1), (1, 2), (2, 1), (1, 30), (3, 7), (20, 64)):
        for valid in padding_masks(batch, length):
            states = draw(batch, length, 8)
            chosen = selector.select(states, valid, torch.Generator().manual_seed(1))
            expect(isinstance(chosen, tuple) and len(chosen) == 2, selector, "must return (rows, positions)")
            for what, indices, count in (("rows", chosen[0], batch), ("positions", chosen[1], length)):
                where = f"of a batch of {batch} x {length}"
                by_row = what == "positions" and isinstance(indices, Tensor) and indices.dim() == 2
                shape = (len(chosen[0]), indices.shape[1]) if by_row else (indices.numel(),)
                expect_tensor(indices, selector, what, shape, torch.int64)
                inside = indices.numel() > 0 and int(indices.min()) >= 0 and int(indices.max()) < count
                expect(inside, selector, f"picks {what} {indices.tolist()} {where}")
                ascending = bool((indices.diff() > 0).all())
                expect(ascending, selector, f"must pick ascending, unique {what}, found {indices.tolist()} {where}")
            expect_unchanged(selector, "states", draw(batch, length, 8), states)
            again = selector.select(states, valid, torch.Generator().manual_seed(1))
            same = all(torch.equal(a, b) for a, b in zip(chosen, again, strict=True))
            expect(same, selector, "picks differently with the same generator; draw from the one it is given")


def check_real_tokens(selector: ProbeSelector) -> None:
    """No position of padding alone is probed while one with real tokens is left out, and no such row."""
    for batch, length in ((1, 30), (3, 7), (20, 64)):
        for valid in padding_masks(batch, length):
            if valid is None:
                continue
            rows, positions = selector.select(draw(batch, length, 8), valid, torch.Generator().manual_seed(1))
            by_row = (
                [(valid[row], own) for row, own in zip(rows, positions, strict=True)] if positions.dim() == 2 else []
            )
            for real, chosen in [(valid.any(1), rows), *(by_row or [(valid.any(0), positions)])]:
                left_out = int(real.sum()) - int(real[chosen].sum())
                expect(
                    bool(real[chosen].all()) or not left_out,
                    selector,
                    f"probes padding and leaves out {left_out} of {int(real.sum())} places with real tokens, in a "
                    f"batch of {batch} x {length}; choose those where valid is true first",
                )


def check_merge(merger: HistoryMerger) -> None:
    """The merged statistic is (t, C), float32, finite and not negative, and its inputs are unchanged."""
    for site in both_kinds():
        for scale in (1.0, 0.0, 1e-12, 1e12):
            probe, history = draw(5, 24).square() * scale, draw(5, 24, seed=1).square() * scale
            seen = (probe.clone() if merger.uses_probe else None, history.clone() if merger.uses_history else None)
            merged = merger.merge(*seen, site)
            expect_tensor(merged, merger, "the merged statistic", (5, 24))
            expect(bool((merged >= 0).all()), merger, "merges two statistics into something negative")
            for what, before, after in (("probe", probe, seen[0]), ("history", history, seen[1])):
                if after is not None:
                    expect_unchanged(merger, what, before, after)


def check_merge_order(merger: HistoryMerger) -> None:
    """A merged entry follows its channel and its position to another place: it does not depend on their numbers."""
    for site in both_kinds():
        probe, history = draw(5, 24).square(), draw(5, 24, seed=1).square()
        _, channels = reordered(site)
        positions = torch.tensor([3, 0, 4, 1, 2])
        merged = _merged(merger, probe, history, site)
        turned = _merged(merger, probe[:, channels], history[:, channels], site)
        expect(alike(turned, merged[:, channels]), merger, "merges by the number of a channel, or mixes channels")
        turned = _merged(merger, probe[positions], history[positions], site)
        expect(alike(turned, merged[positions]), merger, "merges an entry with another position's")


def check_merge_scale(merger: HistoryMerger) -> None:
    """A merged entry lies between the probe's and history's, so that it stays on the statistic's scale."""
    if not (merger.uses_probe and merger.uses_history):
        return
    for site in both_kinds():
        probe, history = draw(5, 24).square(), draw(5, 24, seed=1).square()
        outside = _outside(_merged(merger, probe, history, site), probe, history)
        expect(outside is None, merger, f"merges to an entry outside of probe and history: {outside}")


def _merged(merger: HistoryMerger, probe: Tensor, history: Tensor, site: Site) -> Tensor:
    seen = (probe.clone() if merger.uses_probe else None, history.clone() if merger.uses_history else None)
    return merger.merge(*seen, site).clone()


def _outside(found: Tensor, one: Tensor, other: Tensor) -> str | None:
    """The first entry that does not lie between those of two tensors; None: all do."""
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    wrong = ((found < low * (1 - 1e-4) - 1e-6) | (found > high * (1 + 1e-4) + 1e-6)).nonzero()
    if not len(wrong):
        return None
    place = tuple(wrong[0].tolist())
    return f"{float(found[place]):.3g} of {float(one[place]):.3g} and {float(other[place]):.3g}"


def check_update_entries(merger: HistoryMerger) -> None:
    """An updated entry depends on its own history and batch alone, and lies between them: history cannot grow."""
    if not merger.updates:
        return
    history, observed = draw(5, 10).square(), draw(5, 10, seed=1).square()
    updated = merger.update(history.clone(), observed.clone())
    other = observed.clone()
    other[2, 3] += 5
    again = merger.update(history.clone(), other)
    if updated is None or again is None:
        return
    moved = (~torch.isclose(updated, again)).nonzero().tolist()
    expect(moved in ([], [[2, 3]]), merger, "updates an entry by others: it mixes positions or channels")
    outside = _outside(updated, history, observed)
    expect(outside is None, merger, f"updates an entry to a number outside of history and batch: {outside}")


def check_update(merger: HistoryMerger) -> None:
    """The updated history is (T, c), and there is one exactly if ``updates`` is true."""
    history, observed = draw(5, 10).square(), draw(5, 10, seed=1).square()
    updated = merger.update(history.clone(), observed.clone())
    if merger.updates:
        updated = expect_tensor(updated, merger, "the updated history", (5, 10))
        expect(not torch.equal(updated, history), merger, "has updates true, and leaves history as it was")
    else:
        unchanged = updated is None or torch.equal(updated, history)
        expect(unchanged, merger, "updates history although its property updates is false: it would never be called")
