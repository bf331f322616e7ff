"""History in less memory: what is stored, what is read, and that decisions hardly move."""

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import ChannelHistory, HistoryStorage, MeanSquare, SpecError

POOLS = [1, 2, 3, 16, 100]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", POOLS)
def test_the_first_position_has_a_row_of_its_own(pool):
    storage = HistoryStorage(pool=pool)
    rows = storage.row_of(torch.arange(50)).tolist()
    assert rows[0] == 0 and rows.count(0) == 1
    assert rows == [0] + [1 + position // pool for position in range(49)]
    for positions in range(51):
        assert storage.rows_for(positions) == len(set(rows[:positions]))


@pytest.mark.parametrize("pool", POOLS)
def test_rows_are_the_means_of_their_tokens(pool):
    storage, values = HistoryStorage(pool=pool), draw(20, 5).square()
    counts = torch.arange(20).float() % 4  # some positions have shown nothing
    means, tokens = storage.pooled(values, counts)
    rows = storage.row_of(torch.arange(20))
    for row in range(storage.rows_for(20)):
        mine = rows == row
        assert tokens[row] == counts[mine].sum()
        if pool > 1:
            expected = (values[mine] * counts[mine, None]).sum(0) / counts[mine].sum().clamp(min=1)
            torch.testing.assert_close(means[row], expected)
    if pool == 1:
        assert means is values and tokens is counts


@pytest.mark.parametrize(("dtype", "precision"), [("float32", 0), ("float16", 1.1e-3), ("bfloat16", 4e-3)])
def test_precision_and_range(dtype, precision):
    storage = HistoryStorage(dtype=dtype)
    values = torch.logspace(-7, 9, 400)
    stored = storage.encode(values)
    assert stored.dtype == getattr(torch, dtype)
    assert ((storage.decode(stored) / values - 1).abs() <= precision).all()
    assert storage.decode(storage.encode(torch.tensor([0.0]))) == 0
    assert storage.decode(storage.encode(torch.tensor([1e30]))).isfinite(), "a value too large for it must not blow up"


def history(storage=None, positions=20, channels=6):
    found = ChannelHistory(channels, torch.device("cpu"))
    for seed in range(3):
        MeanSquare().observe(found, draw(4, positions, channels, seed=seed), None)
    whole = found.clone()
    if storage:
        found.store(storage)
    return found, whole


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("pool", POOLS)
def test_decisions_read_the_rows_of_their_positions(pool, dtype):
    storage = HistoryStorage(pool=pool, dtype=dtype)
    found, whole = history(storage)
    assert found.positions == 20 and len(found.table) == storage.rows_for(20)
    rows = storage.row_of(torch.arange(20))
    means = torch.stack([whole.table[rows == rows[position]].mean(0) for position in range(20)])
    chosen = torch.tensor([0, 1, 7, 19])
    torch.testing.assert_close(found.at(chosen), means[chosen], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found.summed(), whole.table.sum(0), rtol=2e-3, atol=1e-6)
    columns = torch.tensor([1, 4])
    known = found.of_columns(7, columns)
    assert known.shape == (storage.rows_for(7), 2) and known.dtype == torch.float32
    before = found.clone()
    found.write(columns, known * 2)
    torch.testing.assert_close(found.of_columns(7, columns), known * 2, rtol=2e-3, atol=1e-6)
    others = [channel for channel in range(6) if channel not in columns]
    assert torch.equal(found.table[:, others], before.table[:, others]) and before.storage == storage
    assert torch.equal(found.table[len(known) :], before.table[len(known) :])


def test_plain_storage_touches_nothing():
    found, whole = history(HistoryStorage())
    assert torch.equal(found.table, whole.table) and torch.equal(found.rows, whole.rows)
    chosen = torch.tensor([2, 5])
    assert torch.equal(found.at(chosen), whole.table[chosen]) and torch.equal(found.summed(), whole.table.sum(0))
    negative, _ = history()
    negative.table -= 10
    assert (negative.at(chosen) == 0).all() and (negative.summed() == 0).all()


def run(model, batches, rounds=1, mask=None, **options):
    """Kept units of every batch, the logits of the last, bytes of statistics."""
    options = {"ratio": 0.4, "calibration": batches, "trace": True, **options}
    with prune(model, "pp", **options) as pruned, torch.no_grad():
        for _ in range(rounds):
            for batch in batches:
                logits = model(batch["input_ids"], attention_mask=mask, use_cache=False).logits
        kept = [(r["layer"], r["kind"], set(r["kept"])) for r in pruned.trace]
        first = [cut.history.table.clone() for cut in pruned._engine.cuts]
        pruned.reset()
        again = [cut.history.table for cut in pruned._engine.cuts]
        assert not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "history must have moved"
        return kept, logits, pruned.held_bytes()["statistics"]


def changed(one, other):
    """Share of the kept units that differ."""
    return sum(len(a - b) for (_, _, a), (_, _, b) in zip(one, other, strict=True)) / sum(len(a) for _, _, a in one)


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
@pytest.mark.parametrize(
    ("storage", "least", "most", "size"),
    [
        ({"dtype": "float16"}, 0, 0.005, 0.53),
        ({"dtype": "bfloat16"}, 0, 0.02, 0.53),
        ({"pool": 4}, 0.001, 0.2, 0.32),
        ({"pool": 64, "dtype": "float16"}, 0.001, 0.25, 0.08),
    ],
)
def test_decisions_hardly_move_and_memory_shrinks(make_model, batches, family, storage, least, most, size):
    model = make_model(family)
    plain, _, held = run(model, batches, rounds=5)
    found, logits, smaller = run(model, batches, rounds=5, history=storage)
    assert least <= changed(plain, found) <= most and logits.isfinite().all()
    assert smaller <= size * held


def test_padding_weighs_nothing_in_a_row(make_model, batches):
    """Positions that are padding in every row leave the rows that they share with others to the others."""
    model, ids = make_model("llama-gqa"), batches[0]["input_ids"]
    mask = torch.ones(4, 24, dtype=torch.int64)
    mask[:, 20:] = 0
    mask[1, 5:] = 0
    tables = []
    for filler in (0, 50):
        text = torch.where(mask.bool(), ids, filler)
        with prune(model, "pp", ratio=0.4, calibration=batches, history={"pool": 4}) as pruned, torch.no_grad():
            model(text, attention_mask=mask, use_cache=False)
            tables.append([cut.history.table for cut in pruned._engine.cuts])
    for one, other in zip(*tables, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_keeps_the_small_steps_of_an_average():
    """An average with momentum 0.99 steps by less than bfloat16 resolves; roots in float16 follow it."""
    ends = {}
    for dtype in ("float32", "float16", "bfloat16"):
        storage = HistoryStorage(dtype=dtype)
        stored = storage.encode(torch.full((1,), 1.0))
        for _ in range(300):
            stored = storage.encode(torch.lerp(torch.full((1,), 0.8), storage.decode(stored), 0.99))
        ends[dtype] = float(storage.decode(stored))
    assert ends["float16"] == pytest.approx(ends["float32"], rel=0.05) and ends["float32"] < 0.82
    assert ends["bfloat16"] > 0.95, "if this ever holds, bfloat16 need not be warned of"


def test_options_are_checked(make_model, batches):
    model = make_model("llama-gqa")
    for history_, said in (
        ({"pool": 0}, r"history.pool: .*greater than or equal to 1 \(found 0\)"),
        ({"dtype": "float8"}, r"history.dtype: .* \(found 'float8'\)"),
        ({"buckets": 4}, r"history.buckets: unknown key"),
    ):
        with pytest.raises(SpecError, match=said):
            prune(model, "pp", ratio=0.4, calibration=batches, history=history_)


def test_cuts_made_once_keep_what_calibration_gathered(make_model, batches):
    model, kept = make_model("llama-gqa"), []
    for storage in ({}, {"dtype": "bfloat16", "pool": 64}):
        with prune(model, "wanda_sp", ratio=0.4, calibration=batches, history=storage) as pruned:
            kept.append((pruned.kept(), pruned.held_bytes()["statistics"]))
    assert kept[0] == kept[1]
