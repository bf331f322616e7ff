"""Calibration statistics shared by several prunings: the same decisions and results, and no text read twice."""

from functools import partial

import pytest
import torch
from prunekit.compress import prune as discovering_prune
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.registry import Catalog, NonFiniteError

RUNS = [
    ("pp", {}),
    ("flap", {}),
    ("wanda_sp", {}),
    ("pp", {"compensate": "mean"}),
    ("flap", {"compensate": "none"}),
    ("wanda_sp", {"compensate": "mean", "skip_layers": (1,)}),
    ("pp", {"skip_layers": (0,), "attention_unit": "query_head"}),
    ("flap", {"skip_layers": (2,), "attention_unit": "query_head"}),
    ("pp_reference", {"skip_layers": ()}),
    ("wanda_sp", {"sequential": True}),
    ("full_batch_probing", {"merger": "fixed_ratio"}),
]

prune = partial(discovering_prune, catalog=Catalog.discover(block=""))


@pytest.fixture
def padded(batches):
    """The calibration batches with left padding in some rows."""
    mask = (torch.arange(24) >= torch.tensor([0, 5, 0, 2])[:, None]).long()
    return [{**batch, "attention_mask": mask} for batch in batches]


@pytest.fixture
def model(make_counting):
    return make_counting()


def outcome(model, use, calibration, statistics=None, **options):
    """Everything that a run can show: decisions, logits of two batches, what is held, and histories afterwards."""
    generator = torch.Generator().manual_seed(3)
    with (
        prune(model, use, ratio=0.4, calibration=calibration, trace=True, statistics=statistics, **options) as pruned,
        torch.no_grad(),
    ):
        logits = [model(torch.randint(3, 97, (4, 24), generator=generator), use_cache=False).logits for _ in range(2)]
        histories = [(cut.history.table, cut.history.rows, cut.history.mean) for cut in pruned._engine.cuts]
        return pruned.trace, pruned.counts, pruned.held_bytes(), logits, histories


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("order", [1, -1], ids=["whole, forwards", "padded, backwards"])
def test_sharing_changes_nothing(model, batches, padded, order):
    calibration, shared, seen = batches if order > 0 else padded, SharedStatistics(), set()
    for use, options in RUNS[::order]:
        alone = outcome(model, use, calibration, **options)
        assert same(outcome(model, use, calibration, shared, **options), alone), (use, options)
        seen.add(alone[3][0].sum().item())
    assert len(seen) >= 9  # they are really different runs


def test_a_text_is_read_once_for_a_statistic(model, batches):
    shared = SharedStatistics()

    def passes(use, calibration=batches, **options):
        before = model.passes
        with prune(model, use, ratio=0.4, calibration=calibration, statistics=shared, **options):
            return model.passes - before

    assert passes("pp") == 4
    assert passes("pp") == passes("wanda_sp") == passes("pp", compensate="mean", skip_layers=(0,)) == 0
    assert passes("wanda_sp", attention_unit="query_head") == 0
    assert passes("flap") == 4 and passes("flap") == 0  # another statistic
    assert passes("pp_reference", skip_layers=()) == 0  # what it does to padding begins after calibration
    other = [{"input_ids": batch["input_ids"].flip(1)} for batch in batches]
    assert passes("pp", other) == 4 and passes("pp", other) == 0 == passes("pp")
    assert passes("pp", [{**batch, "attention_mask": torch.ones(4, 24).long()} for batch in batches]) == 4
    assert passes("magnitude") == 0
    assert passes("wanda_sp", sequential=True) > 4  # never shared
    assert passes("pp") == 0


def test_layers_that_were_skipped_before_are_still_gathered(model, batches):
    shared = SharedStatistics()
    skipping = outcome(model, "pp", batches, shared, skip_layers=(0,))
    assert same(outcome(model, "pp", batches, shared), outcome(model, "pp", batches))
    assert same(outcome(model, "pp", batches, shared, skip_layers=(0,)), skipping)


def test_what_a_run_learns_stays_its_own(model, batches):
    """PP changes its history with every batch; the next run, and one at the same time, still start from calibration."""
    shared = SharedStatistics()
    first = outcome(model, "pp", batches, shared)
    fresh = outcome(model, "wanda_sp", batches)
    assert not torch.equal(first[4][1][0], fresh[4][1][0])  # its own history has moved
    assert same(outcome(model, "pp", batches, shared), first)
    assert same(outcome(model, "wanda_sp", batches, shared), fresh)
    for known in shared._of.values():
        for history in known.values():
            history.table.fill_(float("nan"))  # nor can what is shared change a run that has begun
    assert not any(table.isnan().any() for table, _, _ in first[4])


def test_the_oldest_text_is_forgotten(model, batches):
    texts = [[{"input_ids": batch["input_ids"].roll(n, 1)} for batch in batches] for n in range(3)]
    shared = SharedStatistics(texts=2)

    def passes(number):
        before = model.passes
        with prune(model, "pp", ratio=0.4, calibration=texts[number], statistics=shared):
            return model.passes - before

    assert [passes(n) for n in (0, 1, 0, 2)] == [4, 4, 0, 4]  # 0 was used after 1, so 1 goes
    assert [passes(n) for n in (0, 2, 1)] == [0, 0, 4]
    assert len(shared._of) == 2
    none = SharedStatistics(texts=0)
    assert same(outcome(model, "pp", texts[0], none), outcome(model, "pp", texts[0])) and not none._of


def test_a_failed_calibration_is_not_remembered(model, batches):
    shared = SharedStatistics()
    weight = model.model.layers[1].mlp.up_proj.weight
    kept = weight[3, 5].item()
    with torch.no_grad():
        weight[3, 5] = float("nan")
    with pytest.raises(NonFiniteError):
        prune(model, "pp", ratio=0.4, calibration=batches, statistics=shared)
    with torch.no_grad():
        weight[3, 5] = kept
    assert same(outcome(model, "pp", batches, shared), outcome(model, "pp", batches))


def test_no_mean_is_handed_on_where_none_is_asked_for(model, batches):
    shared = SharedStatistics()
    for use, options, has_mean in (
        ("pp", {"compensate": "mean"}, True),
        ("pp", {}, False),
        ("wanda_sp", {}, False),
        ("flap", {"compensate": "none"}, True),  # its statistic is about the mean
    ):
        with prune(model, use, ratio=0.4, calibration=batches, statistics=shared, **options) as pruned:
            histories = [cut.history for cut in pruned._engine.cuts]
            assert [history.mean is not None for history in histories] == [has_mean] * 6


def test_covariances_of_a_text_are_gathered_once(make_model, batches):
    model, statistics = make_model("llama-gqa"), SharedStatistics()
    options = dict(ratio=0.4, calibration=batches, compensate="least_squares")
    ids = batches[0]["input_ids"]

    def run(strategy, shared):
        passes = []
        progress = lambda items, label, total: passes.append(label) or items  # noqa: E731
        with prune(model, strategy, statistics=shared, progress=progress, **options), torch.no_grad():
            return model(ids, use_cache=False).logits, passes

    alone, passes = run("wanda_sp", None)
    assert passes == ["calibrating", "covariances"]
    first, passes = run("wanda_sp", statistics)
    assert passes == ["calibrating", "covariances"]
    again, passes = run("wanda_sp", statistics)
    assert passes == []
    assert torch.equal(alone, first) and torch.equal(first, again)
    other, passes = run("pp", statistics)
    assert passes == [] and torch.equal(other, run("pp", None)[0])


def test_covariances_beyond_the_limit_are_gathered_anew(make_model, batches):
    model, statistics = make_model("llama-gqa"), SharedStatistics(covariance_bytes=4 * 128 * 128)
    passes = []
    progress = lambda items, label, total: passes.append(label) or items  # noqa: E731
    for _ in range(2):
        options = dict(ratio=0.4, calibration=batches, compensate="least_squares")
        with prune(model, "wanda_sp", statistics=statistics, progress=progress, **options):
            pass
    assert passes == ["calibrating", "covariances", "covariances"]
