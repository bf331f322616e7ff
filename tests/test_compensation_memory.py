"""Memory that covariances take: computed before any is taken, shared out over passes, and let go."""

import gc
import weakref

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration import covariance as covariances
from prunekit.compress.calibration.covariance import check_layers, grouped
from prunekit.registry import ChannelMoments, ModelError, SiteCovariance
from prunekit.strategies.compensation import LeastSquares

GIB = 2**30
ATTENTION, MLP = 4 * 128 * 128, 4 * 192 * 192
"""Bytes of the covariances of the tiny models' sites."""


def least_squares(size=None, **options):
    return {"name": "least_squares", "memory_gib": None if size is None else size / GIB, **options}


def working(channels, dropped, per_batch=False):
    return LeastSquares().memory_plan(channels, dropped, per_batch).working


def passes():
    """A progress that notes what every pass over the calibration text is called."""
    labels = []

    def progress(items, label, total):
        labels.append(label)
        return items

    return labels, progress


def logits(model, batches):
    return model(batches[0]["input_ids"]).logits


def cuts_of(make_model, batches, use="wanda_sp", **options):
    """The sites of a pruned model, as grouping looks at them."""
    with prune(make_model("llama-gqa"), use, ratio=0.4, calibration=batches, **options) as pruned:
        return pruned._engine.cuts


# Several passes


@pytest.mark.parametrize(
    ("use", "compensate", "size"),
    [("wanda_sp", {"name": "least_squares"}, 700_000), ("pp", {"name": "low_rank_least_squares", "rank": 4}, 400_000)],
)
def test_several_passes_give_what_one_gives(make_model, batches, use, compensate, size):
    model, found = make_model("llama-gqa"), {}
    for limit in (1.0, size / GIB):
        labels, progress = passes()
        options = dict(ratio=0.4, calibration=batches, compensate={**compensate, "memory_gib": limit})
        with prune(model, use, progress=progress, **options):
            found[limit] = logits(model, batches)
        parts = len(labels) - 1
        if limit == 1:
            assert labels == ["calibrating", "covariances"]
        else:
            assert 1 < parts < 6
            assert labels[1:] == [f"covariances, part {n} of {parts}" for n in range(1, parts + 1)]
    torch.testing.assert_close(found[size / GIB], found[1.0], rtol=1e-5, atol=1e-5)


def test_groups_fill_the_room_that_there_is(make_model, batches):
    cuts = cuts_of(make_model, batches, compensate=least_squares())
    work = max(working(c.site.channels, c.site.channels - len(c.site.columns(c.fixed))) for c in cuts)

    def sizes(budget):
        for cut in cuts:
            cut.compensation.compensator = LeastSquares(memory_gib=budget / GIB)
        return [len(group) for group in grouped(cuts, per_batch=False)]

    assert sizes(3 * (ATTENTION + MLP) + work + 1) == [6]
    assert sizes(3 * (ATTENTION + MLP) + work - 9) == [5, 1]


def test_the_largest_work_of_a_group_counts_wherever_it_stands(make_model, batches):
    """The MLP is solved while the attention's covariance, gathered after it, waits."""
    attention, mlp = cuts_of(make_model, batches, compensate=least_squares())[:2]
    work = working(192, 192 - mlp.count)
    for budget, expected in ((MLP + ATTENTION + work + 1, [2]), (MLP + ATTENTION + work - 9, [1, 1])):
        for cut in (attention, mlp):
            cut.compensation.compensator = LeastSquares(memory_gib=budget / GIB)
        assert [len(group) for group in grouped([mlp, attention], per_batch=False)] == expected


def test_every_device_has_room_of_its_own(make_model, batches, monkeypatch):
    """Two sites that are too large for one device together are gathered at once where they lie on two."""
    cuts = cuts_of(make_model, batches, compensate=least_squares())[1::2]
    work = working(192, 192 - cuts[1].count)
    for cut in cuts:
        cut.compensation.compensator = LeastSquares(memory_gib=(2 * MLP + work - 9) / GIB)
    assert [len(group) for group in grouped(cuts, per_batch=False)] == [1, 1, 1]
    places = {id(cut.binding.consumer): torch.device("cuda", index % 2) for index, cut in enumerate(cuts)}
    monkeypatch.setattr(covariances, "device_of", lambda module: places[id(module)])
    assert [len(group) for group in grouped(cuts, per_batch=False)] == [2, 1]


# What does not fit


def test_a_site_that_does_not_fit_is_refused_before_anything_is_gathered(make_model, batches):
    model = make_model("llama-gqa")
    dense, (labels, progress) = logits(model, batches), passes()
    with pytest.raises(ModelError) as error:
        options = dict(ratio=0.4, calibration=batches, progress=progress)
        prune(model, "wanda_sp", compensate=least_squares(ATTENTION), **options)
    for words in (
        "layer 0 attention: compensator least_squares needs 0.0625 MiB for the covariance of 128 channels",
        "to solve it, and 0.0625 MiB may be used; nothing was taken. Allow more (memory_gib), or use compensate: mean",
    ):
        assert words in str(error.value)
    assert labels == ["calibrating"]
    assert torch.equal(logits(model, batches), dense)


def test_what_earlier_sites_hold_counts_where_cuts_are_made_per_batch(make_model, batches):
    """Room for three sites' prepared parts is room for every slope of a cut made once, and not for six of them."""
    size, options = 4 * MLP + 3 * MLP, dict(ratio=0.4, calibration=batches)
    with prune(make_model("llama-gqa"), "wanda_sp", compensate=least_squares(size), **options):
        pass
    size = ATTENTION * 3 + MLP * 3 + MLP // 2
    with pytest.raises(ModelError, match=r"layer \d \w+: .* MiB held for the sites before it") as error:
        prune(make_model("llama-gqa"), "pp", compensate=least_squares(size), **options)
    assert "layer 0" not in str(error.value)
    low_rank = {"name": "low_rank_least_squares", "rank": 4, "memory_gib": size / GIB}
    with prune(make_model("llama-gqa"), "pp", compensate=low_rank, **options):
        pass  # what it prepares is smaller


def test_sequential_calibration_needs_room_for_both_sites_of_a_layer(make_model, batches):
    model, (labels, progress) = make_model("llama-gqa"), passes()
    work = working(192, 77)
    options = dict(ratio=0.4, calibration=batches, sequential=True, progress=progress)
    with pytest.raises(ModelError, match=r"layer 0: sequential .* both its sites .*sequential: false"):
        prune(model, "wanda_sp", compensate=least_squares(MLP + work + ATTENTION // 2), **options)
    assert labels == []
    with prune(model, "wanda_sp", compensate=least_squares(8 * MLP + work), **options):
        assert logits(model, batches).isfinite().all()


def test_slopes_of_earlier_layers_count_in_sequential_calibration(make_model, batches):
    cuts = cuts_of(make_model, batches, compensate=least_squares())
    work = working(192, 192 - cuts[1].count)
    for cut in cuts:
        cut.compensation.compensator = LeastSquares(memory_gib=(MLP + ATTENTION + work + 9) / GIB)
    check_layers(cuts[:2])
    with pytest.raises(ModelError, match=r"layer 1"):
        check_layers(cuts)


def test_without_a_limit_most_of_the_free_memory_may_be_used(make_model, batches, monkeypatch):
    options = dict(ratio=0.4, calibration=batches, compensate="least_squares")
    monkeypatch.setattr(covariances, "get_max_memory", lambda: {"cpu": 100_000})
    with pytest.raises(ModelError, match=r"and 0.0763 MiB may be taken on cpu; .* Free memory or allow more"):
        prune(make_model("llama-gqa"), "wanda_sp", **options)
    monkeypatch.setattr(covariances, "get_max_memory", lambda: {"mps": 10**9})  # the CPU's memory is the GPU's there
    with prune(make_model("llama-gqa"), "wanda_sp", **options):
        pass


# What is let go


@pytest.mark.parametrize("use", ["wanda_sp", "pp"])
@pytest.mark.parametrize("sequential", [False, True])
def test_covariances_are_gone_once_they_are_solved(make_model, batches, monkeypatch, use, sequential):
    if use == "pp" and sequential:
        pytest.skip("sequential calibration is for cuts made once")
    taken = []
    take = ChannelMoments.take_covariance

    def noted(moments):
        covariance = take(moments)
        taken.extend([weakref.ref(moments), weakref.ref(covariance)])
        return covariance

    monkeypatch.setattr(ChannelMoments, "take_covariance", noted)
    options = dict(ratio=0.4, calibration=batches, sequential=sequential, compensate="least_squares")
    with prune(make_model("llama-gqa"), use, **options) as pruned:
        gc.collect()
        assert len(taken) == 12 and all(ref() is None for ref in taken)
        assert all(cut.compensation.moments is None for cut in pruned._engine.cuts)


# What is stated


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_what_is_stated_is_near_what_is_allocated(share):
    """The sum of tensors alive at once, as torch's own profiler counts it on the CPU."""
    channels = 384
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    dropped, kept = (part.sort().values for part in order.tensor_split([int(share * channels)]))
    sample = torch.randn(2 * channels, channels, generator=torch.Generator().manual_seed(1))
    covariance = sample.T @ sample / len(sample)
    for compensator, per_batch in ((LeastSquares(), False), (LeastSquares(), True)):
        made = covariance.clone()

        def work(compensator=compensator, per_batch=per_batch, made=made):
            prepared = compensator.prepare(SiteCovariance(made, 2 * channels, kept, once=not per_batch))
            return prepared if per_batch else compensator.slope(prepared, kept, dropped)

        stated = working(channels, len(dropped), per_batch)
        assert stated / 1.3 < peak_of(work) < stated * 1.3, (compensator.name, per_batch)


def peak_of(work):
    """Bytes allocated at once, at the most, while ``work`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak
