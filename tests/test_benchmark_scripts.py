"""The benchmark scripts run, at toy size, through the very code that measures the real ones."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prunekit.compress.bench.presets import PRESETS, Preset

from tests.scripts import run_script

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "compensation_width.py"


def run(*arguments: str) -> subprocess.CompletedProcess:
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--threads", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=one_core, timeout=300)


def rows(section: str) -> list[list[str]]:
    """The cells of a section's tables, heads and rules left out."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rules = [at for at, row in enumerate(cells) if set(row[0]) == {"-"}]
    return [row for at, row in enumerate(cells) if at not in rules and at + 1 not in rules]


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, str]:
    """The toy page, cut at its headings of the second level, by their first letters."""
    out = tmp_path_factory.mktemp("benchmark") / "page.md"
    done = run("--toy", "--out", str(out))
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^## ", out.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {part[0]: part for part in parts}


def test_a_static_cut_is_measured_at_both_widths(sections):
    assert [row[:3] for row in rows(sections["A"])] == [["MLP", "96", "38"], ["heads", "128", "48"]]
    assert sections["A"].count("within 8 GiB") == 2
    assert "512 random tokens" in sections["A"]


def test_float32_is_as_good_as_float64(sections):
    found = rows(sections["B"])
    assert [row[0] for row in found] == ["96", "128"]
    for _, covariance, uncentred, slope, output, left, bare in found:
        assert 0 < float(covariance) < 1e-6
        assert float(covariance) < float(uncentred)
        assert 0 < float(slope) < 1e-4
        assert 0 < float(output) < 1e-4
        assert 0 < float(left) < float(bare) < 1.5


def test_every_method_is_measured_per_batch(sections):
    names = [row[0] for row in rows(sections["C"])]
    pivots = [f"pivot {share} swapped" for share in ("0%", "5%", "10%", "20%")]
    assert names == ["solve", *pivots, "usual", "low rank 8"] * 4
    assert re.findall(r"^### (\w+, \d+%): C = (\d+)", sections["C"], flags=re.MULTILINE) == [
        ("MLP, 40%", "96"),
        ("MLP, 20%", "96"),
        ("heads, 40%", "128"),
        ("heads, 20%", "128"),
    ]
    assert len(re.findall(r"^- (?:MLP|heads), \d+%: ", sections["C"], flags=re.MULTILINE)) == 4


def test_operations_of_pivots_grow_with_what_is_swapped(sections):
    for case in re.split(r"^### ", sections["C"], flags=re.MULTILINE)[1:5]:
        shares = {row[0]: float(row[5].rstrip("%")) for row in rows(case)}
        assert 0 < shares["pivot 0% swapped"] < shares["pivot 20% swapped"]
        assert 0 < shares["low rank 8"] < shares["solve"]


def test_swapped_units_are_counted(sections):
    found = rows(sections["D"])
    assert [row[:2] for row in found] == [["40%", "heads"], ["40%", "MLP"], ["20%", "heads"], ["20%", "MLP"]]
    for _, _, mean, most in found:
        assert 0 <= float(mean.rstrip("%")) <= float(most.rstrip("%")) <= 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--parts", "A,Z"), "found 'Z'"),
        (("--outputs", "100"), "multiple of 64; found 100"),
        (("--tokens", "1000"), "give a multiple of 4096"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments, said):
    done = run_script(SCRIPT, "--threads", "1", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_history_storage(tmp_path):
    out = tmp_path / "page.md"
    small = ["--batches", "4", "--length", "24", "--rows", "4", "--sequences", "4"]
    done = run_script(SCRIPT.parent / "history_storage.py", *small, "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = {row[0]: row[1:] for row in rows(out.read_text(encoding="utf-8"))[1:]}
    assert found["float32"][:3] == ["100.0%", "0.00%", "0.00%"] and found["float32"][4] == "+0.00%"
    assert float(found["float16 (roots)"][0].rstrip("%")) < 60 and float(found["pool 16"][0].rstrip("%")) < 20
    assert all(float(row[3]) > 1 for row in found.values()) and len(found) == 7


def test_calibration_overhead(tmp_path):
    out = tmp_path / "page.md"
    small = ["--layers", "1", "--rows", "2", "--length", "16", "--rounds", "6", "--threads", "1"]
    done = run_script(SCRIPT.parent / "calibration_overhead.py", *small, "--dtypes", "float32", "--out", str(out))
    assert done.returncode == 0, done.stderr
    found = rows(out.read_text(encoding="utf-8"))[1:]
    assert [row[:2] for row in found] == [["float32", "pp"], ["float32", "flap"]]
    for row in found:
        ratio = row[4].split()[0]  # a machine with other work may leave nothing but noise
        assert float(row[2]) > 0 and (ratio == "noise" or 0.3 < float(ratio) < 10)
        assert row[5].endswith("MiB")


@pytest.mark.filterwarnings("ignore::prunekit.registry.PruneWarning")
def test_decode_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset("llama", hidden=64, intermediate=96, heads=4, kv_heads=2, layers=1))
    out = tmp_path / "steps.csv"
    small = ["--shape", "tiny", "--batch", "2", "--prompt", "8", "--rounds", "1", "--out", str(out)]
    done = run_script(SCRIPT.parent / "decode_steps.py", *small)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["steps.csv"]
    head, *found = list(csv.reader(out.open(encoding="utf-8")))
    assert rows(done.stdout) == found and "Prompts of 8 random tokens" in done.stdout
    measured = [dict(zip(head, row, strict=True)) for row in found]
    arms = ["dense", "sliced", "per_prompt"]
    assert [row["arm"] for row in measured] == [*arms, "every_n", "griffin (decode_only)", *arms]
    assert {(row["layers"], row["batch"]) for row in measured} == {("1", "2")}
    assert all(float(row[key]) > 0 for row in measured for key in head[5:])
    whole = 2 * 2 * 41 * 2 * 16 * 4  # keys and values: 2 rows, 41 positions, 2 heads of 16 channels, float32
    found = [int(row["cache bytes"]) for row in measured]
    assert found == [whole] * 6 + [whole // 2] * 2
    assert all(row["token / sliced"] == "1.000" for row in measured if row["arm"] == "sliced")


def test_the_page_of_decode_steps_has_the_recorded_tables():
    page = (SCRIPT.parents[1] / "results" / "generation" / "steps.md").read_text(encoding="utf-8")
    written = re.findall(r"--out (\S+\.csv)$", page, flags=re.MULTILINE)
    recorded = [list(csv.reader((SCRIPT.parents[2] / name).open(encoding="utf-8"))) for name in written]
    assert len(recorded) == 2
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    assert [rows(table) for table in tables[:2]] == [found[1:] for found in recorded]


def test_the_kernels_script_says_what_it_lacks():
    done = run_script(SCRIPT.parent / "gpu_kernels.py")
    assert done.returncode == 1
    assert "no CUDA device is here" in done.stderr or "pip install triton" in done.stderr


def test_choosing_is_measured_at_every_width():
    script = SCRIPT.parents[1] / "results" / "methods" / "widths.py"
    command = [sys.executable, str(script), "--channels", "64", "96", "--outputs", "32", "--threads", "1"]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one_core, timeout=300)
    assert done.returncode == 0, done.stderr
    head, *found = rows(done.stdout)
    assert [row[:3] for row in found] == [["64", "32", "64"], ["96", "32", "64"]]
    assert all(float(cell) >= 0 for row in found for cell in row[3:]) and len(head) == len(found[0])
