"""Running statistics against plain float64 formulas: padding, uneven batches, growing lengths, half precision."""

import gc
import sys
import types
import warnings

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ChannelHistory, Fluctuation, MeanSquare, position_sums
from prunekit.registry.tensors import kernels

CHANNELS = 7


def fresh() -> ChannelHistory:
    return ChannelHistory(CHANNELS, torch.device("cpu"))


def states(*shape: int, seed: int = 0, offset: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Random channel states; ``offset`` differs by channel, as it does in a model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, CHANNELS, generator=generator) * scale
    return x + offset * torch.linspace(-1, 1, CHANNELS)


def padding(lengths: list[int], positions: int, side: str) -> torch.Tensor:
    """(B, T) bool, true where a token is real."""
    places = torch.arange(positions)
    rows = [places < n if side == "right" else places >= positions - n for n in lengths]
    return torch.stack(rows)


def tokens(batches: list, position: int | None = None) -> torch.Tensor:
    """Every real token of the batches, or those at one position, in float64; (N, C)."""
    found = []
    for x, valid in batches:
        x = x.double()
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if valid is None else valid
        if position is not None:
            x, valid = x[:, position : position + 1], valid[:, position : position + 1]
        found.append(x[valid])
    return torch.cat(found)


def observed(statistic, batches: list) -> ChannelHistory:
    history = fresh()
    for x, valid in batches:
        statistic.observe(history, x, valid)
    return history


UNEVEN = [(5, 1), (3, 2), (1, 3), (8, 4)]


def case(name: str) -> list:
    """Batches (x, valid) of one situation, all of a length where the name does not say otherwise."""
    return {
        "one batch": [(states(4, 6), None)],
        "uneven batches": [(states(rows, 6, seed=seed), None) for rows, seed in UNEVEN],
        "one row": [(states(1, 6, seed=seed), None) for seed in range(3)],
        "growing": [(states(3, length, seed=length), None) for length in (4, 9, 6)],
        "right padding": [
            (states(3, 6, seed=seed), padding(lengths, 6, "right"))
            for seed, lengths in enumerate([[6, 3, 1], [2, 2, 4], [5, 6, 6]])
        ],
        "left padding": [
            (states(3, 6, seed=seed), padding(lengths, 6, "left"))
            for seed, lengths in enumerate([[6, 3, 1], [2, 2, 4], [5, 6, 6]])
        ],
        "a row of padding": [(states(3, 6), padding([6, 0, 2], 6, "right")), (states(2, 6, seed=1), None)],
        "large offset": [(states(rows, 6, seed=seed, offset=300.0), None) for rows, seed in UNEVEN],
    }[name]


CASES = ["one batch", "uneven batches", "one row", "growing", "right padding", "left padding", "a row of padding"]
CASES += ["large offset"]


@pytest.mark.parametrize("name", CASES)
def test_mean_square_is_the_mean_over_real_tokens_at_each_position(name):
    batches = case(name)
    history = observed(MeanSquare(), batches)
    assert history.table.dtype == torch.float32
    assert history.positions == max(x.shape[1] for x, _ in batches)
    for position in range(history.positions):
        seen = tokens([(x, valid) for x, valid in batches if x.shape[1] > position], position)
        assert history.rows[position] == len(seen)
        expected = seen.square().mean(0) if len(seen) else torch.zeros(CHANNELS, dtype=torch.float64)
        torch.testing.assert_close(history.table[position].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_fluctuation_adds_up_to_the_squares_about_the_mean(name):
    batches = case(name)
    history = observed(Fluctuation(), batches)
    seen = tokens(batches)
    assert history.tokens == len(seen)
    torch.testing.assert_close(history.mean.double(), seen.mean(0), rtol=1e-5, atol=1e-5)
    total = (history.table * history.rows[:, None]).double().sum(0)
    expected = (seen - seen.mean(0)).square().sum(0)
    torch.testing.assert_close(total, expected, rtol=2e-5 if name != "large offset" else 2e-3, atol=1e-5)


def test_fluctuation_of_equally_filled_positions_sums_to_the_variance_times_the_positions():
    batches = case("uneven batches")
    history = observed(Fluctuation(), batches)
    variance = tokens(batches).var(0, correction=0)
    torch.testing.assert_close(history.table.sum(0).double(), 6 * variance, rtol=2e-5, atol=1e-6)


def test_fluctuation_does_not_lose_a_small_variance_beside_a_large_mean():
    """The difference of the mean square and the squared mean, in float32, would be noise here."""
    batches = [(states(rows, 6, seed=seed, offset=1000.0, scale=0.05), None) for rows, seed in UNEVEN]
    variance = observed(Fluctuation(), batches).table.sum(0).double() / 6
    torch.testing.assert_close(variance, tokens(batches).var(0, correction=0), rtol=0.02, atol=0)


@pytest.mark.parametrize("statistic", [MeanSquare(), Fluctuation()], ids=lambda s: s.name)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_for_nothing_whatever_it_holds(statistic, side):
    x, valid = states(3, 6), padding([6, 3, 1], 6, side)
    clean = observed(statistic, [(x.masked_fill(~valid[..., None], 0), valid)])
    for junk in (1e30, float("nan"), float("inf")):
        dirty = x.masked_fill(~valid[..., None], junk)
        history = observed(statistic, [(dirty, valid)])
        assert torch.equal(history.table, clean.table)
        assert torch.equal(history.rows, clean.rows)
        measured = statistic.measure(dirty, valid, clean.mean)
        assert torch.equal(measured, statistic.measure(x, valid, clean.mean))


@pytest.mark.parametrize("statistic", [MeanSquare(), Fluctuation()], ids=lambda s: s.name)
def test_a_batch_of_padding_alone_changes_nothing(statistic):
    history = observed(statistic, [(states(2, 6), None)])
    before = history.clone()
    statistic.observe(history, states(2, 6, seed=1), torch.zeros(2, 6, dtype=torch.bool))
    assert torch.equal(history.table, before.table)
    assert torch.equal(history.rows, before.rows)
    assert history.tokens == before.tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("statistic", [MeanSquare(), Fluctuation()], ids=lambda s: s.name)
def test_half_precision_states_give_float32_statistics(statistic, dtype):
    """Squares of 300 overflow float16, and thousands of them lose everything in bfloat16."""
    batches = [(states(rows, 6, seed=seed, offset=300.0).to(dtype), None) for rows, seed in UNEVEN]
    history = observed(statistic, batches)
    same = observed(statistic, [(x.float(), None) for x, _ in batches])
    assert history.table.dtype == torch.float32 and history.table.isfinite().all()
    assert torch.equal(history.table, same.table)
    x = batches[0][0]
    assert torch.equal(statistic.measure(x, None, same.mean), statistic.measure(x.float(), None, same.mean))
    assert observed(MeanSquare(), batches).table.max() > torch.finfo(torch.float16).max


def test_measured_mean_square():
    x, valid = states(3, 6), padding([6, 3, 0], 6, "right")
    plain = MeanSquare().measure(x, None, None)
    torch.testing.assert_close(plain.double(), x.double().square().mean(0), rtol=1e-6, atol=1e-7)
    measured = MeanSquare().measure(x, valid, None)
    for position in range(6):
        seen = tokens([(x, valid)], position)
        torch.testing.assert_close(measured[position].double(), seen.square().mean(0), rtol=1e-6, atol=1e-7)
    nobody = MeanSquare().measure(x, padding([3, 3, 3], 6, "right"), None)
    assert nobody[3:].eq(0).all()  # nothing real there: zero, not a division by it


def test_measured_fluctuation_is_about_the_history_or_else_about_itself():
    x, valid = states(3, 6, offset=5.0), padding([6, 3, 1], 6, "left")
    seen = tokens([(x, valid)])
    for mean in (torch.full((CHANNELS,), 0.5), None):
        centre = seen.mean(0) if mean is None else mean.double()
        measured = Fluctuation().measure(x, valid, mean)
        for position in range(6):
            at = tokens([(x, valid)], position)
            expected = (at - centre).square().sum(0) / max(len(at), 1)
            torch.testing.assert_close(measured[position].double(), expected, rtol=1e-4, atol=1e-5)


def test_a_copied_history_is_its_own():
    history = observed(Fluctuation(), [(states(2, 6), None)])
    copy = history.clone()
    Fluctuation().observe(history, states(2, 6, seed=1), None)
    assert not torch.equal(copy.table, history.table) and not torch.equal(copy.mean, history.mean)
    assert copy.tokens == 12 and history.tokens == 24


def live_bytes() -> int:
    """Bytes of all floating-point tensors that are alive; each storage counts once."""
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def calibration_memory(model, number: int, strategy: str, **options) -> int:
    """Bytes alive at the end of the last batch's pass through the layers, beyond what was there before."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 97, (2, 16), generator=generator) for _ in range(number)]
    gc.collect()
    before, seen = live_bytes(), []

    def hook(*call):
        seen.append(live_bytes() if len(seen) == number - 1 else 0)

    handle = model.model.layers[-1].register_forward_hook(hook)
    try:
        with prune(model, strategy, ratio=0.3, calibration=batches, **options):
            pass
    finally:
        handle.remove()
    assert len(seen) == number
    return seen[-1] - before


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pp", "flap"])
def test_calibration_takes_no_more_memory_for_more_batches(make_model, strategy, monkeypatch):
    model = make_model("llama-gqa", num_hidden_layers=1)
    few, many = (calibration_memory(model, number, strategy) for number in (3, 24))
    one_batch = 2 * 16 * model.config.hidden_size * 4
    assert few > 0 and many - few < one_batch
    # The same measurement finds activations that somebody keeps, whether as they are or as a copy.
    for keep in (torch.Tensor.detach, torch.Tensor.clone):
        kept, sums = [], ChannelHistory.grow

        def observe(self, history, x, valid, kept=kept, keep=keep, sums=sums):
            kept.append(keep(x))
            history.mean = x.float().mean((0, 1))
            sums(history, x.shape[1])

        monkeypatch.setattr(MeanSquare, "observe", observe)
        monkeypatch.setattr(Fluctuation, "observe", observe)
        hoarded = calibration_memory(model, 24, strategy) - few
        assert hoarded > 20 * one_batch


def test_kernels_that_cannot_be_launched_are_done_without(monkeypatch):
    """Triton without a compiler, or on a device that it does not know: one warning, and the same sums."""
    tried = []

    def fail(x, *_):
        tried.append(x)
        raise RuntimeError("no C compiler found")

    broken = types.ModuleType("triton_reductions")
    broken.position_sums = fail
    monkeypatch.setitem(sys.modules, "prunekit.registry.tensors.triton_reductions", broken)
    monkeypatch.setattr("prunekit.registry.tensors.triton_reductions", broken, raising=False)
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    kernels._runs_on.cache_clear()
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    try:
        with pytest.warns(RuntimeWarning, match=r"cannot be used on cpu \(RuntimeError: no C compiler found\)"):
            first = position_sums(x, None)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = position_sums(x, None)[0]
    finally:
        kernels._runs_on.cache_clear()
    assert len(tried) == 1
    for found in (first, second):
        torch.testing.assert_close(found, x.sum(0))
