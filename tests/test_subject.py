"""What evaluators see of a pruned model: kept units, the steps of a decision, and bytes held."""

from contextlib import contextmanager

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.registry import STAGES


@pytest.fixture
def ids():
    return torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(11))


@pytest.fixture
def measuring(make_model, batches):
    """A Measuring of a small model pruned by half; ``measuring.pruned`` is its handle."""

    def make(use, **options):
        model = make_model("llama-gqa")
        pruned = prune(model, use, calibration=batches, ratio=0.5, **options)
        found = Measuring(Loaded(model, None, {}), pruned, lambda items, *_: items, {})
        found.pruned = pruned
        return found

    return make


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_kept_units_of_the_last_pass(measuring, ids):
    running = measuring("pp", skip_layers=[0])
    subject, model = running, running.loaded.model
    everything = {(layer, kind): n for layer in range(3) for kind, n in (("attention", 4), ("mlp", 192))}
    assert {(site.layer, site.kind): site.units for site in subject.sites} == everything
    seen = []
    for batch in (ids, ids.flip(1).roll(3, 0)):
        logits(model, batch)
        seen.append(subject.kept())
    assert seen[0] != seen[1]
    for kept in seen:
        assert kept[0, "mlp"] == tuple(range(192)) and kept[0, "attention"] == (0, 1, 2, 3)
        for place, count in running.pruned.counts.items():
            assert len(kept[place]) == count < everything[place] and list(kept[place]) == sorted(set(kept[place]))
    with subject.dense():
        logits(model, ids)
        assert subject.kept() == {place: tuple(range(units)) for place, units in everything.items()}
    static = measuring("wanda_sp", trace=True)
    kept = static.kept()
    assert kept == {(r["layer"], r["kind"]): tuple(r["kept"]) for r in static.pruned.trace}
    logits(static.loaded.model, ids)
    assert static.kept() == kept


@pytest.mark.parametrize("use", ["pp", "full_batch_probing", "wanda_sp"])
def test_watched_steps_come_in_order(measuring, ids, use):
    running = measuring(use, **({"merger": "probe_only"} if use == "full_batch_probing" else {}))
    subject, seen, nested = running, [], []

    @contextmanager
    def stage(name):
        seen.append(name)
        nested.append(name)
        yield
        nested.remove(name)

    with subject.watch(stage):
        logits(subject.model, ids)
    assert not nested and set(seen) <= set(STAGES)
    attention, mlp = ["gather"] * 4, ["gather"] * 3
    if use == "wanda_sp":
        assert seen == (attention + mlp) * 3
    elif use == "full_batch_probing":
        decide = ["select", "probe", "score"]
        assert seen == (decide + attention + decide + mlp) * 3
    else:
        decide = ["select", "probe", "score"]
        # The consumer's input is observed before its own weight is gathered; all sites learn when the batch is through.
        site = [decide + which[:-1] + ["history", "gather"] for which in (attention, mlp)]
        assert seen == (site[0] + site[1]) * 3 + ["history"]
    count = len(seen)
    logits(subject.model, ids)
    with subject.watch(stage), subject.dense():
        logits(subject.model, ids)
    assert len(seen) == count


def test_held_bytes(measuring, ids):
    running = measuring("wanda_sp")
    subject, model, cuts = running, running.loaded.model, running.pruned._engine.cuts
    statistics = sum(4 * (24 * cut.site.channels + 24) for cut in cuts)
    assert subject.held_bytes() == {"statistics": statistics, "gathered": 0}
    logits(model, ids)
    # Half of every projection: q, o 128 x 128, k, v 64 x 128; gate, up, down 192 x 128.
    gathered = 3 * 4 * 128 * (2 * 128 + 2 * 64 + 3 * 192) // 2
    assert subject.held_bytes() == {"statistics": statistics, "gathered": gathered}
    with subject.dense():
        assert subject.held_bytes()["gathered"] == 0
    probing = measuring("pp")
    assert probing.held_bytes()["statistics"] == 2 * statistics  # and what they were when calibrated
    logits(probing.model, ids)
    assert probing.held_bytes()["gathered"] * 3 == gathered  # the layers take turns with one layer's memory
    with probing.dense():
        assert probing.held_bytes()["gathered"] == 0


@pytest.mark.parametrize(
    ("use", "compensate", "steps"),
    [
        # Attention's producers are gathered before its consumer; compensation comes after that.
        ("wanda_sp", "mean", ["gather"] * 4 + ["compensate"]),
        ("wanda_sp", "least_squares", ["gather"] * 4 + ["compensate"] * 2),
        ("wanda_sp", "probe_mean", ["select", "probe"] + ["gather"] * 4 + ["compensate"]),
        ("pp", "mean", ["select", "probe", "score"] + ["gather"] * 3 + ["history", "gather", "compensate"]),
        (
            "pp",
            "least_squares",
            ["select", "probe", "score"] + ["gather"] * 3 + ["history", "gather"] + ["compensate"] * 2,
        ),
    ],
)
def test_giving_back_is_a_step_of_its_own(measuring, ids, use, compensate, steps):
    subject, seen = measuring(use, compensate=compensate), []

    @contextmanager
    def stage(name):
        seen.append(name)
        yield

    with subject.watch(stage):
        logits(subject.model, ids)
    assert seen[: len(steps)] == steps
    assert seen.count("compensate") == 6 * steps.count("compensate") and set(seen) <= set(STAGES)


def test_held_bytes_of_compensation(measuring, ids):
    plain, cuts = measuring("wanda_sp"), measuring("wanda_sp").pruned._engine.cuts
    channels = [cut.site.channels for cut in cuts]
    before = plain.held_bytes()["statistics"] + 4 * sum(channels)  # and the mean
    held = {}
    for use, compensate in (("wanda_sp", "mean"), ("wanda_sp", "least_squares"), ("pp", "least_squares")):
        subject = measuring(use, compensate=compensate)
        held[use, compensate] = subject.held_bytes()["statistics"]
        logits(subject.model, ids)
        assert subject.held_bytes()["statistics"] == held[use, compensate]
    assert held["wanda_sp", "mean"] == before
    # A slope for half of the channels; the pivoted covariance and which channels it is pivoted on.
    assert held["wanda_sp", "least_squares"] == before + sum(4 * (c // 2) ** 2 for c in channels)
    assert held["pp", "least_squares"] == 2 * before + sum(4 * c * c + c for c in channels)
