"""The Triton kernels, in Triton's interpreter on a CPU: ``make test-kernels`` installs it and runs this file."""

import os

import pytest
import torch
from prunekit.compress import prune
from prunekit.registry import position_sums
from prunekit.registry.tensors import kernels, reductions

if os.environ.get("TRITON_INTERPRET") != "1":  # looked at when triton is imported, which other libraries do at once
    pytest.skip("needs Triton, and TRITON_INTERPRET=1 from the beginning: make test-kernels", allow_module_level=True)
pytest.importorskip("triton")


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_they_are_used_where_they_can_be(monkeypatch):
    x = torch.zeros(2, 3, 4)
    assert kernels.usable_on(x)
    monkeypatch.setenv(kernels.VARIABLE, "plain")
    assert not kernels.usable_on(x)
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not kernels.usable_on(x), "on a CPU only in the interpreter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 9, 70), (5, 33, 300)])
def test_sums_over_rows(shape, dtype):
    from prunekit.registry.tensors import triton_reductions

    x, valid, centre = draw(*shape, dtype=dtype), draw(*shape[:2], seed=1) > 0, draw(shape[2], seed=2)
    for real in (None, valid):
        for square in (True, False):
            for middle in (None, centre):
                found = triton_reductions.position_sums(x, real, square, middle)
                expected = reductions._row_by_row(x, real, square, middle)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(position_sums(x, valid, square=True)[0], triton_reductions.position_sums(x, valid, True, None))


def test_a_batch_that_does_not_lie_in_one_piece():
    x = draw(4, 7, 40).transpose(0, 1)
    torch.testing.assert_close(position_sums(x, None)[0], x.sum(0), rtol=1e-5, atol=1e-5)
    sliced = draw(4, 7, 40)[:, ::2]
    torch.testing.assert_close(position_sums(sliced, None)[0], sliced.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
@pytest.mark.parametrize("biased", [True, False])
def test_products_of_kept_rows_and_columns(dtype, tolerance, biased):
    """Sizes that are not multiples of a block. (The interpreter's products know no bfloat16.)"""
    from prunekit.compress.engine.fused_linear import linear_of_columns, linear_of_rows

    weight, kept = draw(70, 50, dtype=dtype), torch.randperm(70, generator=torch.Generator().manual_seed(3))[:33]
    kept = kept.sort().values
    x, bias = draw(2, 19, 50, dtype=dtype, seed=1), draw(33, dtype=dtype, seed=2) if biased else None
    expected = torch.nn.functional.linear(x, weight[kept], bias)
    torch.testing.assert_close(linear_of_rows(x, weight, kept, bias), expected, rtol=tolerance, atol=tolerance)
    consumer = weight.t()  # (50, 70), by columns
    x, bias = draw(2, 19, 33, dtype=dtype, seed=1), draw(50, dtype=dtype, seed=2) if biased else None
    expected = torch.nn.functional.linear(x, consumer[:, kept], bias)
    torch.testing.assert_close(linear_of_columns(x, consumer, kept, bias), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("family", "column_major"), [("llama-gqa", True), ("opt", True), ("llama-gqa", False)])
def test_a_pruned_model_computes_the_same_with_them(make_model, batches, family, column_major, monkeypatch):
    from prunekit.compress.engine import fused_linear

    model, found, called = make_model(family, num_hidden_layers=2), [], []
    runtime = {"fused_gather": True, "column_major": column_major}
    call = fused_linear._call
    monkeypatch.setattr(fused_linear, "_call", lambda *args, **given: called.append(given) or call(*args, **given))
    for plain in (False, True):
        if plain:
            monkeypatch.setenv(kernels.VARIABLE, "plain")
        with prune(model, "pp", ratio=0.4, calibration=batches, runtime=runtime) as pruned:
            with torch.no_grad():
                logits = [model(b["input_ids"], use_cache=False).logits for b in batches[:2]]
                generated = model.generate(batches[0]["input_ids"][:1], max_new_tokens=2, do_sample=False)
            found.append((logits, generated, pruned.kept(), [cut.history.table for cut in pruned._engine.cuts]))
        expected = ({"llama-gqa": 4 + 3, "opt": 4 + 2}[family] - (0 if column_major else 2)) * 2 * 2
        assert len(called) == expected, (
            "every layer of two batches but those across the grain, none of a generation's, none without kernels"
        )
    (logits, tokens, kept, tables), (theirs, same, kept_too, tables_too) = found
    assert kept == kept_too and torch.equal(tokens, same)
    for one, other in zip(logits + tables, theirs + tables_too, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_the_benchmark_of_the_kernels_runs(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    script = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "gpu_kernels.py"
    command = [sys.executable, str(script), "--toy", "--rounds", "1", "--out", str(tmp_path / "page.md")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    for way in ("| Triton |", "| vector norm |", "| fused (Triton) |", "| gather, then product |"):
        assert way in page
