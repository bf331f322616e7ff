"""Memory: bytes that can be computed are exact, peaks rise by what is allocated, stderr stays clean."""

import gc
import os
import weakref
from types import SimpleNamespace

import pytest
import torch
from prunekit.compress import prune
from prunekit.compress.calibration.passes import no_progress
from prunekit.compress.models.loading import Loaded
from prunekit.compress.runs.measuring import Measuring
from prunekit.evaluators import allocations
from prunekit.evaluators.allocations import peak_bytes, weight_bytes, without_profiler_warnings
from prunekit.evaluators.memory import Memory
from prunekit.registry import Catalog, SpecError

SMALL = {"batch_size": 4, "length": 24, "decode_steps": 3}
FLOAT = 4


def test_it_is_offered_as_a_plugin():
    assert Catalog.discover(block="").get("evaluators", "memory") is Memory


@pytest.fixture
def measure(make_model, batches):
    """Values and protocol on a tiny model; ``change`` may tamper with it, ``of`` gets the pruned handle."""

    def measured(use="wanda_sp", change=lambda model: None, family="llama-gqa", prune_with=None, **options):
        model = make_model(family)
        change(model)
        with prune(model, use, ratio=0.5, skip_layers=[0], calibration=batches, **(prune_with or {})) as pruned:
            subject = Measuring(Loaded(model, None, {}), pruned, no_progress, {})
            found = Memory(**{**SMALL, **options}).evaluate(subject)
            found.counts = dict(pruned.counts)
        return found

    return measured


def gathered_bytes(counts):
    """Bytes of the copied weights of layers 1 and 2: heads of 16 channels in groups of two, hidden size 128."""
    heads, width = counts[1, "attention"], counts[1, "mlp"]
    return 2 * FLOAT * 128 * (16 * heads * (2 + 1 + 1 + 2) + 3 * width)


def test_weights_statistics_and_copies_are_exact(measure, make_model):
    found = measure("wanda_sp")
    values, model = found.values, make_model("llama-gqa")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert values["weights"] == values["dense_weights"] == FLOAT * parameters + buffers
    # Two layers: a table of 24 positions by channel, and how many rows each position has shown.
    assert values["statistics"] == 2 * FLOAT * (24 * (128 + 192) + 2 * 24)
    assert values["gathered"] == gathered_bytes(found.counts)
    assert values["dense_statistics"] == values["dense_gathered"] == 0
    assert values["prefill_peak"] > values["gathered"]


def test_a_dynamic_cut_holds_its_copies_while_it_decodes(measure):
    found = measure("pp")
    assert found.values["gathered"] == gathered_bytes(found.counts)
    # The histories move, so that calibrated copies of them are kept.
    assert found.values["statistics"] == 2 * 2 * FLOAT * (24 * (128 + 192) + 2 * 24)
    assert found.values["decode_peak"] > found.values["gathered"]
    without = measure("pp", decode_steps=0)
    # Without a cache all layers gather into the same memory.
    assert without.values["gathered"] * 2 == gathered_bytes(found.counts) and "decode_peak" not in without.values
    fresh = measure("pp", decode_steps=0, prune_with={"runtime": {"shared_buffers": False}})
    assert fresh.values["gathered"] == 0
    # Copies that a pass makes for itself go as it proceeds, so they are never all there at once.
    assert without.values["prefill_peak"] < measure("wanda_sp").values["prefill_peak"]


@pytest.mark.parametrize(
    ("use", "compensate", "of_site"),
    [
        ("pp", {"name": "least_squares", "per_batch": "solve"}, lambda c, k: FLOAT * c * c),
        # and which channels the pivot was made on, a byte each
        ("pp", {"name": "least_squares", "per_batch": "pivot"}, lambda c, k: FLOAT * c * c + c),
        ("pp", {"name": "low_rank_least_squares", "rank": 12}, lambda c, k: FLOAT * c * (12 + 1)),
        ("wanda_sp", {"name": "least_squares"}, lambda c, k: FLOAT * (c - k) * k),
        ("wanda_sp", {"name": "low_rank_least_squares", "rank": 12}, lambda c, k: FLOAT * 12 * c),
    ],
)
def test_what_compensation_holds_is_part_of_the_statistics(measure, use, compensate, of_site):
    found, mean = (measure(use, prune_with={"compensate": each}, decode_steps=0) for each in (compensate, "mean"))
    sizes = (128, 32 * found.counts[1, "attention"]), (192, found.counts[1, "mlp"])
    assert found.values["statistics"] - mean.values["statistics"] == 2 * sum(of_site(*size) for size in sizes)
    # The slope is folded into weights that are copied anyway.
    assert found.values["gathered"] == mean.values["gathered"]
    if use == "pp":
        assert found.values["prefill_peak"] >= mean.values["prefill_peak"]


@pytest.mark.parametrize(("family", "applier"), [("opt", "slice"), ("llama-gqa", "zero")])
def test_the_models_own_tensors_are_no_copies(measure, family, applier):
    """OPT's consumers keep their biases, and a zeroing cut computes with the producers' own weights."""
    found = measure("wanda_sp", family=family, prune_with={"applier": applier, "compensate": "none"})
    heads, width = found.counts[1, "attention"], found.counts[1, "mlp"]
    copied = FLOAT * (128 * (128 + 192) if applier == "zero" else (4 * 128 + 3) * 16 * heads + (2 * 128 + 1) * width)
    assert found.values["gathered"] == 2 * copied


def test_larger_batches_and_longer_prompts_take_more(measure):
    one, two, longer = (measure(**change).values for change in ({}, {"batch_size": 8}, {"length": 48}))
    for more in (two, longer):
        for key in ("prefill_peak", "dense_prefill_peak", "decode_peak", "dense_decode_peak"):
            assert more[key] > one[key]
        for key in ("weights", "gathered", "statistics"):
            assert more[key] == one[key]


def test_a_tensor_that_is_there_during_the_pass_raises_both_peaks_by_its_size(measure):
    size, plain = 1_234_567, measure().values

    def burden(model):
        held = []
        model.register_forward_pre_hook(lambda *_: held.append(torch.empty(size, dtype=torch.uint8)))
        model.register_forward_hook(lambda *_: held.clear())

    burdened = measure(change=burden).values
    for key in plain:
        assert burdened[key] - plain[key] == (size if key.endswith("peak") else 0)


def test_what_it_depends_on_is_in_the_protocol(measure):
    protocol = measure(seed=5).protocol
    expected = {"batch_size": 4, "length": 24, "decode_steps": 3, "text": "random ids, seed 5", "dtype": "float32"}
    assert {key: protocol[key] for key in expected} == expected
    assert "torch.profiler" in protocol["meter"] and protocol["threads"] == torch.get_num_threads()
    with pytest.raises(SpecError, match=r"memory.decode_steps: .* context of 256; set length to 253"):
        measure(length=256)


# The meters

CPU = SimpleNamespace(parameters=lambda: iter(()), buffers=lambda: iter(()))


def block(size):
    return torch.empty(size, dtype=torch.uint8)


def test_a_release_of_a_block_that_is_older_than_the_measurement_does_not_count():
    """The profiler gives it the size of a block that an earlier profile saw at the same address."""
    size, first = 40_000, []
    peak_bytes(CPU, lambda: None, lambda _: first.extend(block(size) for _ in range(50)))
    known = {each.data_ptr() for each in first}
    first.clear()  # while nothing is measured, so that the profiler goes on knowing the sizes
    older = [each for each in [block(size) for _ in range(100)] if each.data_ptr() in known]
    assert older

    def run(_):
        older.clear()
        return block(5_000)

    assert peak_bytes(CPU, lambda: None, run) == 5_000


def test_the_garbage_collector_frees_nothing_while_a_peak_is_measured():
    class Cycle:
        pass

    garbage = Cycle()
    garbage.itself, garbage.memory = garbage, block(50_000)
    left = weakref.ref(garbage)
    gc.collect()  # now it is old, and a collection in the middle of a pass would find it
    del garbage

    def run(_):
        assert left() is None and not gc.isenabled()
        return block(1_000)

    assert peak_bytes(CPU, lambda: None, run) == 1_000
    assert gc.isenabled()


def test_a_peak_counts_what_is_there_at_once():
    def run(state):
        first = block(1000)
        del first
        second, third = block(300), block(500)
        return len(second) + len(third) + len(state)

    assert peak_bytes(CPU, lambda: block(0), run) == 1000
    assert peak_bytes(CPU, lambda: block(50), run) == 1050


def test_what_preparing_frees_again_is_no_part_of_the_peak():
    def prepare():
        large = block(100_000)
        return block(len(large) // 1000)

    assert peak_bytes(CPU, prepare, lambda state: block(11)) == 111
    assert peak_bytes(CPU, prepare, lambda state: None) == 100


def test_cuda_peaks_are_those_after_preparing(monkeypatch):
    """By a stand-in for CUDA's statistics: peaks are reset after ``prepare``, what was there before does not count."""
    allocated, peak, order = {0: 1000, 1: 500}, {0: 9999, 1: 9999}, []

    def reset(device):
        peak[device.index] = allocated[device.index]
        order.append("reset")

    def allocate(index, size):
        allocated[index] += size
        peak[index] = max(peak[index], allocated[index])

    monkeypatch.setattr(allocations, "accelerators", lambda model: (torch.device("cuda:0"), torch.device("cuda:1")))
    for name, function in {
        "memory_allocated": lambda device: allocated[device.index],
        "max_memory_allocated": lambda device: peak[device.index],
        "reset_peak_memory_stats": reset,
        "synchronize": lambda device: order.append("synchronize"),
    }.items():
        monkeypatch.setattr(allocations.torch.cuda, name, function)

    def prepare():
        allocate(0, 700)
        allocate(0, -600)

    def run(state):
        order.append("run")
        allocate(0, 30)
        allocate(0, -30)
        allocate(1, 4)

    assert peak_bytes(CPU, prepare, run) == 100 + 30 + 4
    assert order == ["synchronize", "reset"] * 2 + ["run"] + ["synchronize"] * 2
    assert "max_memory_allocated" in allocations.meter(CPU)


def test_devices_without_statistics_are_refused(monkeypatch):
    monkeypatch.setattr(allocations, "accelerators", lambda model: (torch.device("mps:0"),))
    with pytest.raises(SpecError, match=r"this model is on mps; leave the memory evaluator out"):
        peak_bytes(CPU, lambda: None, lambda state: None)


def test_tied_weights_count_once_and_offloaded_ones_do_not(make_model):
    model = make_model("llama-gqa", tie_word_embeddings=True)
    assert weight_bytes(make_model("llama-gqa")) - weight_bytes(model) == FLOAT * 97 * 128
    before = weight_bytes(model)
    model.model.norm.to("meta")
    assert before - weight_bytes(model) == FLOAT * 128


def test_the_profilers_chatter_is_kept_from_stderr(capfd):
    held = [block(1000)]
    # A block from before that goes while the profiler looks on is what torch warns of.
    assert peak_bytes(CPU, held.clear, lambda state: None) == 0
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        with without_profiler_warnings():
            os.write(2, b"[W] CPUAllocator: " + allocations.PROFILER_WARNINGS[0] + b"\nsomething that matters\n")
            raise ZeroDivisionError
    assert capfd.readouterr().err == "something that matters\n"
