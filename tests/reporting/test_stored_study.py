"""The figures of a stored study are those that earlier versions computed, but for intervals that were too wide."""

import gzip
from pathlib import Path

import pandas as pd
import pytest
from prunekit.compress.reporting.pivot import cross, join
from prunekit.compress.reporting.pivot_tables import pivot_csv
from prunekit.compress.reporting.statistics import difference
from prunekit.compress.reporting.summary import summarise
from prunekit.compress.reporting.tables import table_csv
from prunekit.compress.reporting.trials import read
from scipy import stats

STORED = Path(__file__).with_name("stored")
LAST_IN_TABLE = 2.086
"""Student's t for 20 degrees of freedom, which earlier versions used for more, too."""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("stored") / "study.sqlite"
    path.write_bytes(gzip.decompress((STORED / "study.sqlite.gz").read_bytes()))
    return read(path)


def same(new, name, tmp_path):
    (tmp_path / name).write_text(new, encoding="utf-8")
    old = pd.read_csv(STORED / name)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name)[list(old)], old, rtol=1e-9)


def test_the_table_and_the_cross_tables_are_the_same(study, tmp_path):
    same(table_csv(summarise(study)), "table.csv", tmp_path)
    grid = join([study])
    question = grid.question("strategy", "compensation", by="ratio")
    same(pivot_csv(question, cross(grid, question)), "pivot.csv", tmp_path)


def test_intervals_are_the_same_and_those_over_questions_narrower(study):
    summary = summarise(study)
    by_name = {summary.name(c).replace(" (", ", ").rstrip(")"): c for c in summary.configurations}
    for old in pd.read_csv(STORED / "intervals.csv").itertuples():
        metric = summary.metric(old.metric)
        best, other = (summary.sample(by_name[name], metric) for name in (old.best, old.other))
        (new,) = (one for one in difference(metric, best, other).intervals if one.unit == old.unit)
        middle, reach = (old.low + old.high) / 2, (old.high - old.low) / 2
        if old.unit == "question":
            reach *= stats.t.ppf(0.975, old.count - 1) / LAST_IN_TABLE
        assert new.count == old.count
        assert (new.low, new.high) == pytest.approx((middle - reach, middle + reach), abs=1e-4 * reach)
