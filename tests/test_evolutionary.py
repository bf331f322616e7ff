"""The allocator that searches: it finds the optimum of a toy, keeps the budget, and resumes to the same result."""

import itertools
import json
import math
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.ablation.command import ablate
from prunekit.compress.ablation.store import Store
from prunekit.compress.calibration.shared import SharedStatistics
from prunekit.compress.runs.report import markdown
from prunekit.registry import NonFiniteError, SpecError
from prunekit.registry.checks import check_component
from prunekit.strategies.evolutionary import Evolutionary

from tests.toy_sites import freed, places


class Losses:
    """A made-up loss of the shares that are cut; remembers what was asked and recorded."""

    def __init__(self, sites, of):
        self.units, self.of = [scores.site.units for scores in sites], of
        self.asked, self.records, self.how = [], [], []

    def __call__(self, candidates, tokens, **how):
        self.asked += [(tuple(counts), tokens) for counts in candidates]
        self.how.append(how)
        return [float(self.of(1 - np.array(counts) / self.units)) for counts in candidates]

    def record(self, **entry):
        self.records.append(entry)

    @staticmethod
    def progress(items, label, total):
        return items


def weighted(sites, seed):
    """A loss that grows with the square of every share, more at some sites than at others."""
    weights = np.random.default_rng(seed).exponential(size=len(sites))
    return lambda shares: 3 + shares**2 @ weights


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_optimum_of_a_toy_is_found(seed):
    sites = places(2, heads=4, channels=6, head=60, channel=40)
    of, budget = weighted(sites, seed), 0.5 * (2 * 4 * 60 + 2 * 6 * 40)
    every = itertools.product(range(1, 5), range(1, 7), range(1, 5), range(1, 7))
    fits = [counts for counts in every if budget - 40 < freed(sites, counts) <= budget]
    units = np.array([4, 6, 4, 6])
    best = min(of(1 - np.array(counts) / units) for counts in fits)
    found = Evolutionary(generations=25, step=0.01).allocate(sites, 0.5, Losses(sites, of))
    assert of(1 - np.array(found) / units) == pytest.approx(best)


@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.4, 0.77])
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("sizes", [(8, 3, 1536, 294912, 1728), (4, 6, 24, 160, 40), (2, 12, 100, 701, 89)])
def test_every_candidate_meets_the_budget(ratio, across, sizes):
    sites = places(*sizes)
    losses = Losses(sites, weighted(sites, 0))
    allocator = Evolutionary(generations=4, offspring=6, rounds=2, across_kinds=across)
    counts = allocator.allocate(sites, ratio, losses)
    whole = sum(scores.site.units * scores.site.unit_parameters for scores in sites)
    for candidate in {counts for counts, _ in losses.asked} | {tuple(counts)}:
        assert ratio * whole - sizes[-1] < freed(sites, candidate) <= ratio * whole * (1 + 1e-6)
        assert min(candidate) >= 1
    heads = {sum(counts[::2]) for counts, _ in losses.asked}
    assert across or len(heads) == 1
    assert ratio < 0.1 or len(losses.asked) > 20


def test_the_best_never_gets_worse_and_every_generation_is_recorded():
    sites = places(4)
    losses = Losses(sites, weighted(sites, 3))
    found = Evolutionary(generations=6, rounds=2, objective="loss", tokens=77).allocate(sites, 0.4, losses)
    best = [entry["best"] for entry in losses.records]
    assert best == sorted(best, reverse=True) and best[0] > best[-1]
    assert best[-1] == losses.of(1 - np.array(found) / losses.units)
    assert [(entry["round"], entry["generation"], entry["step"]) for entry in losses.records] == [
        (round_, generation, 0.125 / round_) for round_ in (1, 2) for generation in range(1, 7)
    ]
    assert sum(entry["measured"] for entry in losses.records) == len(losses.asked)
    assert {entry["tokens"] for entry in losses.records} == {77} and losses.how[0]["objective"] == "loss"


def test_survivors_are_found_in_stages_and_the_parent_joins_the_last_one():
    sites = places(4)
    losses = Losses(sites, weighted(sites, 1))
    stages = ((5, 10), (2, 20))
    allocator = Evolutionary(generations=1, offspring=9, stages=stages, tokens=30, length=40, top_logits=8)
    allocator.allocate(sites, 0.4, losses)
    assert [tokens for _, tokens in losses.asked] == [10] * 9 + [20] * 5 + [30] * 3
    offspring, second, third = losses.asked[:9], losses.asked[9:14], losses.asked[14:]
    parent, *last = [counts for counts, _ in third]
    assert parent not in [counts for counts, _ in offspring] and len({counts for counts, _ in offspring}) == 9
    assert set(last) <= {counts for counts, _ in second} <= {counts for counts, _ in offspring}
    best = sorted((losses.of(1 - np.array(counts) / losses.units), counts) for counts, _ in offspring)[:2]
    assert last == [counts for _, counts in best]
    assert losses.how[0] == {"length": 40, "objective": "kl", "top_logits": 8}


def test_rounds_stay_within_reach_of_their_beginning():
    sites = places(6, channels=96)
    losses = Losses(sites, lambda shares: shares[1::2] @ np.array([9, 0, 0, 0, 0, 0]))
    options = dict(generations=8, step=0.125, across_kinds=False)
    Evolutionary(reach=1, **options).allocate(sites, 0.4, losses)
    start = losses.asked[-1][0]
    kept = np.array([counts for counts, _ in losses.asked])
    assert np.abs(kept[:, 1::2] - np.median(kept[:, 1::2])).max() <= 12 + 1 and len(start) == 12
    far = Losses(sites, losses.of)
    Evolutionary(**options).allocate(sites, 0.4, far)
    assert np.array([counts for counts, _ in far.asked])[:, 1].max() > kept[:, 1].max()


def test_the_seed_decides():
    sites = places(4)
    asked = []
    for seed in (0, 0, 1):
        losses = Losses(sites, weighted(sites, 1))
        Evolutionary(generations=3, seed=seed).allocate(sites, 0.4, losses)
        asked.append(losses.asked)
    assert asked[0] == asked[1] != asked[2]


def test_an_objective_that_is_not_finite_is_the_last_choice_and_alone_refused():
    sites = places(3)
    losses = Losses(sites, lambda shares: math.nan if shares[0] > 0.4 else 3 - shares[0])
    assert Evolutionary(generations=10).allocate(sites, 0.4, losses)[0] >= 6 * 0.6
    with pytest.raises(NonFiniteError, match=r"evolutionary: no cut that it measured .* has a finite objective"):
        Evolutionary(generations=20).allocate(sites, 0.4, losses := Losses(sites, lambda shares: math.nan))
    assert len(losses.asked) <= 1 + 2 * Evolutionary().offspring  # of the first generation alone


def test_what_cannot_be_is_refused():
    sites = places(3)
    losses = Losses(sites, weighted(sites, 0))
    with pytest.raises(SpecError, match=r"evolutionary: a ratio of 0\.97 .* minimum_units: 1, so 0\.8958 can be cut"):
        Evolutionary().allocate(sites, 0.97, losses)
    with pytest.raises(SpecError, match="evolutionary measures the model"):
        Evolutionary().allocate(sites, 0.5)
    assert Evolutionary().allocate(sites, 0.0, losses) == [6, 24] * 3 and not losses.asked
    for stages in (((4, 10), (8, 20)), ((0, 10),), ((4, 1),)):
        with pytest.raises(ValueError, match="stages are pairs of survivors"):
            Evolutionary(stages=stages)
    counts = Evolutionary(mlp_multiple=8, generations=3).allocate(sites, 0.5, losses)
    assert all(count % 8 == 0 for count in counts[1::2]) and min(counts) > 0
    check_component(Evolutionary(generations=2))


def test_one_site_has_nothing_to_exchange():
    sites = places(1)[1:]
    assert Evolutionary(generations=2).allocate(sites, 0.25, Losses(sites, lambda shares: 1.0)) == [18]


SEARCH = {"name": "evolutionary", "generations": 3, "offspring": 4, "stages": [[2, 48]], "tokens": 96, "step": 0.25}


def search_of(model, batches, **options):
    """Kept units, the record, and how many passes through the output layer were made."""
    passes = []
    handle = model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    try:
        with prune(model, "wanda_sp", ratio=0.4, calibration=batches, allocator=SEARCH, **options) as pruned:
            return pruned.counts, pruned.search, len(passes)
    finally:
        handle.remove()


def test_a_search_of_a_model_lowers_the_divergence_and_is_recorded(make_model, batches):
    model = make_model("llama-gqa")
    counts, search, _ = search_of(model, batches)
    assert [entry["generation"] for entry in search] == [1, 2, 3]
    assert 0 < search[-1]["best"] < search[0]["best"]
    whole = 3 * (192 * 3 * 128 + 4 * 96 * 128)
    lost = sum((4 if kind == "attention" else 192) - count for (_, kind), count in counts.items() if kind == "mlp")
    heads = sum(4 - count for (_, kind), count in counts.items() if kind == "attention")
    assert 0.4 * whole - 384 < lost * 384 + heads * 96 * 128 <= 0.4 * whole
    assert search_of(model, batches)[:2] == (counts, search)


@pytest.mark.parametrize("where", ["study", "file"])
@pytest.mark.parametrize("after", [1, 5, 17])
def test_a_killed_search_resumes_to_the_same_result(make_model, batches, tmp_path, where, after):
    model, path = make_model("llama-gqa"), tmp_path / ("measured" if where == "study" else "statistics.safetensors")
    counts, search, passes = search_of(model, batches)

    def statistics():
        return SharedStatistics(journal=path) if where == "study" else path

    class Killed(BaseException):
        """Nothing is written after it."""

    steps = []

    def kill(*_):
        steps.append(1)
        if len(steps) > after:
            journal = path if where == "study" else tmp_path / ".statistics.safetensors.measured"
            left = journal.read_bytes() if journal.exists() else b""
            steps.append(left)
            raise Killed

    handle = model.lm_head.register_forward_hook(kill)
    with pytest.raises(Killed):
        search_of(model, batches, statistics=statistics())
    handle.remove()
    journal = path if where == "study" else tmp_path / ".statistics.safetensors.measured"
    left = steps[-1][:-9]  # as a run leaves it that was killed while it wrote a line
    journal.write_bytes(left)
    if where == "file" and after > 1:
        path.unlink()  # written as the exception passed, which a kill would not have let happen
    found, again, more = search_of(model, batches, statistics=statistics())
    assert (found, again) == (counts, search)
    assert more < passes or not left
    assert where == "study" or not journal.exists()
    assert search_of(model, batches, statistics=statistics()) == (counts, search, 0)


def test_a_study_keeps_what_a_killed_search_measured(small_pipeline, tmp_path, monkeypatch):
    content = small_pipeline("llama-gqa", use="wanda_sp", allocator=SEARCH)
    study, store = tmp_path / "study.yaml", tmp_path / "store.sqlite"
    study.write_text(json.dumps({"base": content, "vary": {"prune.ratio": [0.3, 0.4]}}))
    journal = tmp_path / ".store.sqlite.measured"
    run = lambda: ablate(study, out=store, show=lambda path, trials: None)  # noqa: E731
    measured = []
    pass_of = torch.nn.functional.kl_div

    def divergence(*arguments, **options):
        measured.append(1)
        if len(measured) == 9:
            raise KeyboardInterrupt
        return pass_of(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "kl_div", divergence)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(journal.read_text().splitlines()) > 5
    run()
    resumed = len(measured)
    assert not journal.exists()
    with Store.open(store) as opened:
        results = [trial.result.search for trial in opened.trials]
    assert [len(search) for search in results] == [3, 3] and "best" in results[0][0]
    with Store.open(store) as opened:
        assert "- **search**: 3 steps; the last: round 1, generation 3" in markdown(opened.trials[0].result)
    store.unlink()
    run()
    with Store.open(store) as opened:
        assert [trial.result.search for trial in opened.trials] == results
    assert len(measured) - resumed > resumed - 9  # the resumed run had measured less


KILLED = """
import os, pathlib, signal, sys, torch
from prunekit.compress.ablation.command import ablate

own, measured = torch.nn.functional.kl_div, []

def divergence(*arguments, **options):
    measured.append(1)
    if len(measured) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*arguments, **options)

torch.nn.functional.kl_div = divergence
ablate(pathlib.Path(sys.argv[1]), out=pathlib.Path(sys.argv[2]), show=lambda path, trials: None)
"""
"""A study whose process is killed in the middle of a search."""


@pytest.mark.slow
def test_a_process_that_is_killed_loses_nothing(small_pipeline, tmp_path, monkeypatch):
    content = small_pipeline("llama-gqa", use="wanda_sp", allocator=SEARCH)
    study, killed = tmp_path / "study.yaml", tmp_path / "killed.sqlite"
    study.write_text(json.dumps({"base": content, "vary": {"prune.ratio": [0.4]}}))
    process = subprocess.run([sys.executable, "-c", KILLED, study, killed], capture_output=True)
    assert process.returncode == -signal.SIGKILL
    assert len((tmp_path / ".killed.sqlite.measured").read_text().split()) > 5
    measured, own = [], torch.nn.functional.kl_div

    def divergence(*arguments, **options):
        measured.append(1)
        return own(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "kl_div", divergence)
    found, passes = [], []
    for store in (killed, tmp_path / "whole.sqlite"):
        measured.clear()
        ablate(study, out=store, show=lambda path, trials: None)
        passes.append(len(measured))
        with Store.open(store) as opened:
            (trial,) = opened.trials
        found.append((trial.result.search, trial.result.layers, trial.result.metrics[0].pruned))
    assert found[0] == found[1] and passes[0] == passes[1] - 8
