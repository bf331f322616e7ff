"""Probes whose rows have positions of their own: what they pick, and that each row sees what it would see alone."""

from typing import Literal

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.engine import decider, probing
from prunekit.compress.engine.probing import pick_tokens, probe_states
from prunekit.registry import HistoryMerger, Strategy
from prunekit.registry.checks.parts import some_site
from prunekit.strategies.pp.selectors import SpreadProbe
from transformers import DynamicCache

BATCH, LENGTH = 4, 24
PLACES = torch.arange(LENGTH)
LENGTHS = torch.tensor([24, 2, 11, 1])[:, None]
MASKS = {"full": None, "right": PLACES < LENGTHS, "left": PLACES >= LENGTH - LENGTHS}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def select(share, valid=None, shape=(BATCH, LENGTH), seed=0):
    return SpreadProbe(positions=share).select(torch.zeros(*shape, 8), valid, generator(seed))


@pytest.mark.parametrize(("share", "count"), [(0.001, 2), (0.05, 2), (0.125, 3), (0.13, 4), (1.0, 24)])
def test_every_row_has_as_many_positions_of_its_own(share, count):
    rows, positions = select(share)
    assert rows.tolist() == [0, 1, 2, 3] and positions.shape == (BATCH, count)
    assert (positions.diff(dim=1) > 0).all() and positions.min() >= 0 and positions.max() < LENGTH
    assert torch.equal(positions, select(share)[1])
    if share < 1:
        assert len({tuple(row) for row in positions.tolist()}) == BATCH
        assert not torch.equal(positions, select(share, seed=1)[1])


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (1, 24)])
def test_short_and_lonely_rows(shape):
    rows, positions = select(0.05, shape=shape)
    assert positions.shape == (shape[0], min(2, shape[1])) and rows.shape == (shape[0],)


@pytest.mark.parametrize("side", ["right", "left"])
def test_real_tokens_come_before_padding(side):
    valid = MASKS[side].clone()
    valid[3] = False
    seen = torch.zeros(BATCH, LENGTH)
    for seed in range(60):
        _, positions = select(0.3, valid, seed=seed)
        real = pick_tokens(valid, torch.arange(BATCH), positions).sum(1)
        assert real.tolist() == [8, 2, 8, 0] and (positions.diff(dim=1) > 0).all()
        seen.scatter_add_(1, positions, torch.ones(positions.shape))
    assert (seen[valid] > 0).all(), "every real token is drawn at some time"


def test_tokens_are_picked_row_by_row():
    t = torch.arange(3 * 5 * 2).view(3, 5, 2)
    rows, positions = torch.tensor([0, 2]), torch.tensor([[1, 4], [0, 3]])
    assert torch.equal(pick_tokens(t, rows, positions), torch.stack([t[0, [1, 4]], t[2, [0, 3]]]))
    assert torch.equal(pick_tokens(t, rows, positions[0]), t[rows][:, [1, 4]])
    # One row for all, as rotary embeddings are, serves a single row only: others are expanded before.
    assert torch.equal(pick_tokens(t[:1], rows[:1], positions[:1]), t[:1, [1, 4]])


def chosen_arguments(arguments, rows, positions, shown):
    """What an attention's other arguments are in a probe of a batch of 6 positions."""
    given = probing.SiteInput(None, torch.zeros(len(rows), 6, 8), None, None, arguments)
    return probing.chosen_arguments(some_site("attention"), given, rows, positions, shown)


@pytest.mark.parametrize("first", [False, True], ids=["selected", "first"])
@pytest.mark.parametrize(("batch", "masks"), [(1, 1), (3, 1), (3, 3)])
def test_arguments_are_cut_to_every_rows_positions(batch, masks, first):
    rows, positions = torch.arange(batch), torch.tensor([[0, 5], [2, 3], [1, 4]])[:batch]
    mask = torch.randn(masks, 1, 6, 6, generator=generator())
    rotary = tuple(torch.randn(1, 6, 8, generator=generator(seed)) for seed in (1, 2))
    arguments = {
        "layer_past": DynamicCache(),
        "position_embeddings": rotary,
        "position_ids": torch.arange(6)[None],
        "attention_mask": mask,
        "scale": 3,
    }
    shown = torch.arange(2) if first else positions
    chosen = chosen_arguments(arguments, rows, positions, shown)
    assert set(chosen) == {"position_embeddings", "position_ids", "attention_mask", "scale"} and chosen["scale"] == 3
    assert torch.equal(chosen["position_ids"], positions)
    seen = [torch.arange(2)] * batch if first else list(positions)
    for row in range(batch):
        wanted = mask[row if masks > 1 else 0, 0][seen[row]][:, seen[row]]
        given = chosen["attention_mask"]
        assert torch.equal(given[row if given.shape[0] > 1 else 0, 0], wanted)
        for whole, part in zip(rotary, chosen["position_embeddings"], strict=True):
            assert torch.equal(part[row], whole[0, positions[row]])
    flat = {**arguments, "attention_mask": torch.randn(masks, 6, generator=generator())}
    found = chosen_arguments(flat, rows, positions, positions)["attention_mask"]
    assert torch.equal(found, flat["attention_mask"].expand(batch, 6).gather(1, positions))


def run(model, ids, valid, batches, **options):
    """Logits of a batch that PP prunes by half, and the units kept."""
    with prune(model, "pp", ratio=0.5, calibration=batches, trace=True, **options) as pruned, torch.no_grad():
        mask = None if valid is None else valid.long()
        return model(ids, attention_mask=mask, use_cache=False).logits, [r["kept"] for r in pruned.trace]


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(("family", "attention"), [("llama-gqa", "sdpa"), ("llama-gqa", "eager"), ("opt", "sdpa")])
def test_each_row_sees_what_it_would_see_alone(make_model, batches, monkeypatch, family, attention, padding):
    compared = []

    def checked(cut, given, rows, positions, seen):
        together = probe_states(cut, given, rows, positions, seen)
        assert positions.shape == (BATCH, 8) and not torch.equal(positions[0], positions[1])
        for row, (states, own) in enumerate(zip(together.view(BATCH, 8, -1), positions, strict=True)):
            alone = probe_states(cut, given, rows[row : row + 1], own, own).view(8, -1)
            real = torch.ones(8, dtype=torch.bool) if valid is None else valid[row, own]
            torch.testing.assert_close(states[real], alone[real], rtol=1e-4, atol=1e-5)
            compared.append(int(real.sum()))
        return together

    valid, model = MASKS[padding], make_model(family, attention=attention)
    monkeypatch.setattr(probing, "probe_states", checked)
    run(model, batches[0]["input_ids"], valid, batches, selector=SpreadProbe(positions=0.3))
    assert sum(compared) == 6 * (4 * 8 if valid is None else 8 + 2 + 8 + 1)


@pytest.mark.parametrize("padding", ["full", "right", "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_same_positions_in_every_row_are_the_plain_probe(make_model, batches, monkeypatch, attention, padding):
    """All positions of all rows, row by row and for the whole batch: equal states, statistics, means and decisions."""
    valid, ids, seen = MASKS[padding], batches[0]["input_ids"], []
    measure, mean_of = Strategy.measure, probing.mean_of

    def summed(self, statistic, x, mask, mean):
        found = measure(self, statistic, x, mask, mean)
        if mask is None or x.shape[0] == 1:  # with padding a position's mean is over its real tokens, not a sum
            seen[-1].append(found.sum(0) * x.shape[0])
        return found

    def averaged(*args):
        seen[-1].append(mean_of(*args))
        return seen[-1][-1]

    monkeypatch.setattr(Strategy, "measure", summed)
    monkeypatch.setattr(probing, "mean_of", averaged)
    options = dict(merger="probe_only", compensate={"name": "probe_mean", "probe": 1.0})
    results = []
    for selector in ("whole_batch", SpreadProbe(positions=1.0)):
        seen.append([])
        results.append(
            run(make_model("llama-gqa", attention=attention), ids, valid, batches, selector=selector, **options)
        )
    if valid is None:
        (plain, kept), (spread, same) = results
        assert kept == same
        torch.testing.assert_close(plain, spread, rtol=1e-4, atol=1e-4)
        for one, other in zip(*seen, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    else:
        # Decisions may differ, so only the first site has seen the same: its mean counts every real token alike.
        torch.testing.assert_close(seen[0][0], seen[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_under_the_padding_does_not_matter(make_model, batches, family, side):
    model, valid, ids = make_model(family), MASKS[side], batches[0]["input_ids"]
    other = torch.where(valid, ids, (ids * 7 + 5) % 97)
    options = dict(selector=SpreadProbe(positions=0.3), compensate="probe_mean")
    (first, kept), (second, same) = (run(model, text, valid, batches, **options) for text in (ids, other))
    assert kept == same and not torch.equal(ids, other)
    torch.testing.assert_close(first[valid], second[valid], rtol=1e-4, atol=1e-5)


def test_masks_are_those_of_the_chosen_rows():
    """A selector may pick some of the rows, each with positions of its own."""
    mask = torch.rand(3, 1, 6, 6, generator=generator())
    rows, seen = torch.tensor([0, 2]), torch.tensor([[1, 4, 5], [0, 2, 3]])
    found = probing._chosen_mask(mask, 3, rows, seen)
    assert found.shape == (2, 1, 3, 3)
    for chosen, row, places in zip(found, rows, seen, strict=True):
        assert torch.equal(chosen, mask[row][:, places][:, :, places])
    flat = torch.rand(3, 6, generator=generator())
    assert torch.equal(probing._chosen_mask(flat, 3, rows, seen), torch.stack([flat[0, seen[0]], flat[2, seen[1]]]))


class Remembered(HistoryMerger):
    """Keeps what it is given."""

    name: Literal["remembered"] = "remembered"

    def merge(self, probe, history, site):
        GIVEN.append((probe, history))
        return probe + history


GIVEN = []


@pytest.mark.parametrize("padding", MASKS)
def test_every_token_meets_the_history_of_its_own_position(make_model, batches, padding, monkeypatch):
    """And padding adds neither to the statistic nor from history."""
    valid, ids, scored = MASKS[padding], batches[0]["input_ids"], []
    scores = decider.Decider._scored

    def channel_scores(self, state, statistic):
        scored.append((state, statistic))
        return scores(self, state, statistic)

    GIVEN.clear()
    model = make_model("opt")
    options = dict(ratio=0.4, calibration=batches, selector=SpreadProbe(positions=0.3), merger=Remembered())
    with prune(model, "pp", trace=True, **options) as pruned, torch.no_grad():
        monkeypatch.setattr(decider.Decider, "_scored", channel_scores)
        model(ids, attention_mask=None if valid is None else valid.long(), use_cache=False)
        positions = torch.tensor([record["positions"] for record in pruned.trace])
    assert len(GIVEN) == len(scored) == len(positions) == 6
    for (probe, history), (state, statistic), places in zip(GIVEN, scored, positions, strict=True):
        assert torch.equal(history, state.history.table[places.flatten()])
        real = torch.ones_like(places) if valid is None else valid.long().gather(1, places)
        assert (probe[real.flatten() == 0] == 0).all()
        torch.testing.assert_close(statistic, ((probe + history) * real.reshape(-1, 1)).sum(0))
