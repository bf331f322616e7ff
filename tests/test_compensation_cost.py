"""What compensation costs: formulas against hand calculations, and its share of a prefill."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import Loaded
from prunekit.compress.reporting import plots
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators.cost import FORMULAS, PARTS, Cost, formulas
from prunekit.evaluators.latency import Latency
from prunekit.registry import SiteCovariance
from prunekit.strategies.compensation.least_squares import LeastSquares
from torch.utils.flop_counter import FlopCounterMode

B, T, HIDDEN = 4, 24, 128


def eye(*shape):
    return torch.eye(shape[-1]).expand(*shape).clone()


def ones(*shape):
    return torch.ones(*shape)


linalg = torch.linalg
HAND = {
    # n = 6: 6^3 = 216
    "cholesky": (lambda: linalg.cholesky(eye(6, 6)), 72),
    "cholesky of two": (lambda: linalg.cholesky(eye(2, 6, 6)), 2 * 72),
    "cholesky_solve": (lambda: torch.cholesky_solve(ones(6, 4), eye(6, 6)), 2 * 36 * 4),
    "cholesky_inverse": (lambda: torch.cholesky_inverse(eye(6, 6)), 2 * 72),
    "lu": (lambda: linalg.lu_factor(eye(6, 6)), 144),
    "lu_solve": (lambda: linalg.lu_solve(*linalg.lu_factor(eye(6, 6)), ones(6, 4)), 144 + 2 * 36 * 4),
    "solve": (lambda: linalg.solve(eye(6, 6), ones(6, 4)), 144 + 2 * 36 * 4),
    "solve for a vector": (lambda: linalg.solve(eye(6, 6), ones(6)), 144 + 2 * 36),
    "solve from the right": (lambda: linalg.solve(eye(6, 6), ones(4, 6), left=False), 144 + 2 * 36 * 4),
    "solve two": (lambda: linalg.solve(eye(2, 6, 6), ones(2, 6, 4)), 2 * (144 + 2 * 36 * 4)),
    "solve two for a vector each": (lambda: linalg.solve(eye(2, 6, 6), ones(2, 6)), 2 * (144 + 2 * 36)),
    "triangular": (lambda: linalg.solve_triangular(eye(6, 6), ones(6, 4), upper=False), 36 * 4),
    "triangular from the right": (
        lambda: linalg.solve_triangular(eye(6, 6), ones(4, 6), upper=True, left=False), 36 * 4
    ),
    "triangular of two, broadcast": (lambda: linalg.solve_triangular(eye(2, 6, 6), ones(6, 4), upper=True), 2 * 36 * 4),
    "inverse": (lambda: linalg.inv(eye(6, 6)), 432),
    "no equations": (lambda: linalg.solve(eye(0, 0), ones(0, 4)), 0),
    "mv": (lambda: ones(5, 3) @ ones(3), 2 * 5 * 3),
    "addmv": (lambda: torch.addmv(ones(5), ones(5, 3), ones(3)), 2 * 5 * 3),
    "addmv_": (lambda: ones(5).addmv_(ones(5, 3), ones(3)), 2 * 5 * 3),
    "dot": (lambda: ones(7) @ ones(7), 2 * 7),
    "addr": (lambda: torch.addr(ones(5, 3), ones(5), ones(3)), 2 * 5 * 3),
    "addr_": (lambda: ones(5, 3).addr_(ones(5), ones(3), alpha=2), 2 * 5 * 3),
    "addmm_": (lambda: ones(5, 3).addmm_(ones(5, 7), ones(7, 3), alpha=-1), 2 * 5 * 7 * 3),
    "baddbmm_": (lambda: ones(2, 5, 3).baddbmm_(ones(2, 5, 7), ones(2, 7, 3)), 2 * 2 * 5 * 7 * 3),
    "mm, once": (lambda: ones(5, 7) @ ones(7, 3), 2 * 5 * 7 * 3),
}  # fmt: skip


@pytest.mark.parametrize("what", HAND)
def test_a_formula_counts_what_the_hand_does(what):
    run, expected = HAND[what]
    with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
        run()
    assert counter.get_total_flops() == expected


def test_every_operation_that_has_a_formula_is_one_of_torch():
    others = [name for name in FORMULAS if not hasattr(torch.ops.aten, name) and "overrideable" not in name]
    assert others == ["grouped_mm_fallback"] and hasattr(torch.ops.transformers, *others)


@pytest.fixture
def measure(make_model, batches):
    """An evaluator's findings on a model that compensates; layers 1 and 2 are cut."""

    def measured(use, compensate, evaluator=None, **options):
        model = make_model("llama-gqa")
        options = {"ratio": 0.5 * 2 / 3, "skip_layers": [0], "calibration": batches, **options}  # 0.5 of two layers
        with prune(model, use, compensate=compensate, **options) as pruned:
            subject = Measuring(Loaded(model, None, {}), pruned, no_progress, {})
            found = (evaluator or Cost(batch_size=B, length=T)).evaluate(subject)
            found.kept = {kind: pruned.counts[1, kind] * size for kind, size in (("attention", 32), ("mlp", 1))}
        return found

    return measured


CHANNELS = {"attention": 128, "mlp": 192}


def a_batch(found, of_site):
    """Operations of a batch by hand: ``of_site`` (C, k) of both kinds of site, in both layers that are cut."""
    return 2 * sum(of_site(CHANNELS[kind], found.kept[kind]) for kind in CHANNELS)


def attributed(found, part="compensation"):
    return round(found.values[part] * B * T)


def test_flops_are_floor_and_probe_and_compensation(measure):
    for use, compensate in (("pp", "least_squares"), ("pp", "probe_mean"), ("wanda_sp", "probe_mean")):
        found = measure(use, compensate)
        assert attributed(found) > 0 and attributed(found, "probe") > 0
        whole = sum(attributed(found, part) for part in ("floor", "probe", "compensation"))
        assert attributed(found, "flops") == whole - attributed(found, "reused")
        assert (attributed(found, "reused") > 0) == (use == "pp")
        assert attributed(found, "dense_compensation") == 0
        # Some versions of transformers count their rotary embedding under other operations.
        assert attributed(found, "other") == attributed(found, "dense_other")


@pytest.mark.parametrize("compensate", ["mean", "least_squares", "low_rank_least_squares"])
def test_a_cut_that_is_made_once_is_compensated_before_the_count(measure, compensate):
    found = measure("wanda_sp", compensate)
    assert found.values["over_floor"] == 1 and attributed(found) == attributed(found, "probe") == 0


def test_what_is_done_once_is_counted_without_a_settling_pass(measure, monkeypatch):
    """The negative control of the test above."""
    monkeypatch.setattr("prunekit.evaluators.cost.short_pass", lambda model, ids: None)
    assert attributed(measure("wanda_sp", "least_squares")) > 0


def test_a_mean_of_the_batch_is_two_products_with_a_vector(measure):
    found = measure("wanda_sp", "probe_mean")
    assert attributed(found) == a_batch(found, lambda c, k: 2 * HIDDEN * (c + k))
    # The calibrated mean stays as it is, and with it its output: that of the kept channels is left.
    found = measure("pp", "mean")
    assert attributed(found) == a_batch(found, lambda c, k: 2 * HIDDEN * k)


def test_a_solve_per_batch_is_a_factor_two_triangles_and_a_fold(measure):
    found = measure("pp", {"name": "least_squares", "per_batch": "solve"})

    def by_hand(c, k):
        factor, triangles, fold, bias = k**3 // 3, 2 * k * k * (c - k), 2 * HIDDEN * (c - k) * k, 2 * HIDDEN * k
        return factor + triangles + fold + bias

    assert attributed(found) == a_batch(found, by_hand)


def test_a_low_rank_solve_per_batch(measure):
    rank = 12
    found = measure("pp", {"name": "low_rank_least_squares", "rank": rank})

    def by_hand(c, k):
        inner, solved = 2 * rank * k * rank + rank**3 // 3, 2 * rank * rank * k
        return inner + solved + 2 * HIDDEN * ((c - k) * rank + rank * k) + 2 * HIDDEN * k

    assert attributed(found) == a_batch(found, by_hand)


def test_the_usual_cuts_solution_is_only_folded(measure):
    found = measure("pp", {"name": "least_squares", "per_batch": "usual"})
    assert attributed(found) == a_batch(found, lambda c, k: 2 * HIDDEN * (c - k) * k + 2 * HIDDEN * k)
    assert attributed(measure("pp", {"name": "least_squares", "per_batch": "pivot"})) > attributed(found)


def a_check(c, k, tokens):
    """What so many tokens lose, and what mean and slope predict; then the products of these, and of five pairs."""
    outputs = tokens * HIDDEN
    shares = 2 * (2 * 2 + 2) * outputs + 2 * (2 * 2 + 2) * 5
    return 2 * outputs * c + 2 * HIDDEN * (c - k) + shares + 2 * HIDDEN * k  # the slope in the bias at last


def test_a_check_is_the_probes_tokens_through_the_whole_consumer(measure):
    """Two tokens of each of four rows; the mean's output is known. PP: half the positions of one row."""
    found = measure("wanda_sp", {"name": "least_squares", "check": True})
    assert attributed(found) == a_batch(found, lambda c, k: a_check(c, k, 8) + 2 * HIDDEN * k)
    found = measure("pp", {"name": "least_squares", "check": True, "per_batch": "usual"})
    assert attributed(found) == a_batch(
        found, lambda c, k: 2 * HIDDEN * (c - k) * k + a_check(c, k, 12) + 2 * HIDDEN * k
    )


def test_to_check_a_mean_alone_is_one_token_of_the_dropped_channels(measure):
    found = measure("wanda_sp", {"name": "mean", "check": True})
    shares = 2 * (2 * 2 + 2) * (HIDDEN + 5)
    assert attributed(found) == a_batch(found, lambda c, k: 4 * HIDDEN * (c - k) + shares + 2 * HIDDEN * k)


def test_correcting_a_pivot_takes_a_system_of_the_channels_that_differ():
    """12 channels; usual are 0 to 7, kept are 2 to 9: 4 channels differ."""
    compensator, base = LeastSquares(), torch.arange(8)
    prepared = compensator.prepare(SiteCovariance(torch.eye(12) + 0.1, 24, base, once=False))
    kept, dropped = torch.arange(2, 10), torch.tensor([0, 1, 10, 11])
    m, k, d = 4, 8, 4
    for cut, expected in ((kept, 2 * m**3 // 3 + 2 * m * m * k + 2 * d * m * k), (base, 0)):
        with FlopCounterMode(display=False, custom_mapping=formulas()) as counter:
            compensator.slope(prepared, cut, dropped if cut is kept else torch.arange(8, 12))
        assert counter.get_total_flops() == expected


def test_counting_begins_with_the_calibrated_history(make_model, batches):
    """The settling pass teaches nothing that the counted batch would decide by."""
    model = make_model("llama-gqa")
    options = {"ratio": 0.5, "skip_layers": [0], "calibration": batches}
    with prune(model, "pp", **options, trace=True) as pruned:
        Cost(batch_size=B, length=T).evaluate(Measuring(Loaded(model, None, {}), pruned, no_progress, {}))
        assert {record["batch"] for record in pruned.trace} == {0} and len(pruned.trace) == 2 * 2 * 2
        counted = [record["kept"] for record in pruned.trace[4:]]
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 97, (B, T), generator=generator)
        pruned.reset()
        model(ids, use_cache=False)
        assert [record["kept"] for record in pruned.trace[8:]] == counted


def test_time_has_the_stage_where_batches_are_compensated(measure):
    evaluator = Latency(batch_size=B, length=T, decode_steps=0, pairs=1, warmup=0)
    parts = measure("pp", "least_squares", evaluator).details["breakdown"]
    assert parts["pruned"]["compensate"] > 0 == parts["dense"]["compensate"]
    assert measure("wanda_sp", "least_squares", evaluator).details["breakdown"]["pruned"]["compensate"] == 0


def test_plots_show_every_part():
    assert set(plots.FLOP_PARTS) == set(PARTS)
    assert plots.LOOKS["compensate"] == plots.LOOKS["compensation"]
