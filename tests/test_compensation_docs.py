"""The page on compensation: every compensator and option is on it, and its numbers are the code's."""

import re
from pathlib import Path

import pytest
import yaml
from prunekit.compress.ablation.study import Study
from prunekit.registry import Catalog, ChannelMoments
from prunekit.strategies.compensation import compensators
from prunekit.strategies.compensation.least_squares import DEPENDENCE, LEAST_SHRINKAGE, LeastSquares
from prunekit.strategies.compensation.low_rank import LowRankLeastSquares

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "compensation.md").read_text()
STRATEGIES = (DOCS / "strategies.md").read_text()
WIDTH, DROPPED = 11_008, int(0.4 * 11_008)


@pytest.fixture(scope="module")
def catalog():
    return Catalog.discover(block="")


@pytest.mark.parametrize("compensator", compensators(), ids=lambda compensator: compensator().name)
def test_every_compensator_and_option_is_explained(compensator):
    name = compensator().name
    assert f"`{name}`" in PAGE.split("## What is computed")[0] and f"`{name}`" in STRATEGIES + "`none`"
    section = PAGE.split(f"\n### `{name}`\n")[1].split("\n## ")[0].split("\n### ")[0]
    options = {option: field.default for option, field in compensator.model_fields.items() if option != "name"}
    assert [option for option in options if f"`{option}`" not in section] == []
    for option, default in re.findall(r"^\| `(\w+)` \| `(.+?)` \|", section, re.MULTILINE):
        found = yaml.safe_load(default)
        assert found == getattr(options[option], "name", options[option]), option


def test_the_strategies_compensations_are_those_of_the_table(catalog):
    for name, compensation in re.findall(r"^\| `(\w+)` \| (?:per batch|once).*\| (\w+) \|$", STRATEGIES, re.MULTILINE):
        assert catalog.get("strategies", name)().compensate.name == compensation
    for selector in (entry.name for entry in catalog.of_role("probe_selectors") if entry.plugin != "example"):
        assert f"`{selector}`" in STRATEGIES


def gigabytes(count):
    return f"{count / 1e9:.1f} GB"


def test_the_memory_is_what_the_code_reckons():
    covariance, kept = ChannelMoments.bytes_of(WIDTH), WIDTH - DROPPED
    cells = re.findall(r"^\| (?:while|afterwards).*?\| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE)
    exact, low = LeastSquares(), LowRankLeastSquares()
    for row, per_batch in zip(cells, (False, True), strict=False):
        solving = (covariance + c.memory_plan(WIDTH, DROPPED, per_batch).working for c in (exact, low))
        assert row == tuple(gigabytes(size) for size in solving)
    assert cells[2] == (f"{4 * DROPPED * kept / 1e6:.0f} MB", f"{4 * WIDTH * low.rank / 1e6:.1f} MB")
    held = [c.memory_plan(WIDTH, DROPPED, True).held / 1e6 for c in (exact, low)]
    assert cells[3] == (f"{held[0]:.0f} MB", f"{held[1]:.1f} MB")
    assert f"{covariance / 1e6:.0f} MB for C = 11,008" in PAGE


def test_the_operations_in_tokens_are_those_of_the_table():
    outputs, kept, rank, moved = 4096, WIDTH - DROPPED, 64, WIDTH // 10
    token = outputs * kept
    assert f"{DROPPED:,} tokens against {rank * WIDTH / kept:.0f};" in " ".join(PAGE.split())
    solved = (kept**3 / 6 + kept**2 * DROPPED) / token
    pivoted = (moved**3 / 3 + moved**2 * kept + DROPPED * moved * kept) / token
    assert f"`solve` adds {round(solved, -2):,.0f} more, `pivot` {round(pivoted, -2):,.0f} if" in " ".join(PAGE.split())


def test_the_study_of_the_pages_table_measures_its_rows_and_columns():
    rows = re.findall(r"^\| ([\d,]+) \| [\d.]+ \| (.+) \|$", PAGE, re.MULTILINE)
    study = Study.load(DOCS / "examples" / "ablations" / "covariance-text.yaml")
    tokens = {trial.spec.calibration.sequences * trial.spec.calibration.length for trial in study.trials}
    assert [f"{count:,}" for count in sorted(tokens)] == [row for row, _ in rows]
    arms = len(study.axes["prune.compensate"])
    for _, cells in rows:
        found = cells.split(" | ")
        assert len(found) == arms * len(study.axes["calibration.bundled"])
        for text in (found[:arms], found[arms:]):  # the best of each text is bold
            values = [float(cell.strip("*")) for cell in text]
            assert [cell.startswith("**") for cell in text] == [value == min(values) for value in values]


def test_the_chosen_ridge_is_the_one_explained():
    words = " ".join(PAGE.split())
    assert DEPENDENCE == 3 and "n is a third of the tokens" in words
    assert "every third token counted, the default" in words
    assert f"between {LEAST_SHRINKAGE:.4f} and {1 - LEAST_SHRINKAGE:.4f}" in words


def test_studies_of_a_fixed_ridge_name_it():
    """What they have gathered must not change with the default."""
    results = DOCS / "results" / "compensation"
    for own, other in ("compensation", "stories"), ("compensation-variants", "stories-variants"):
        vary = [
            yaml.safe_load(path.read_text())["vary"]
            for path in (DOCS / "studies" / f"{own}.yaml", results / f"{other}.yaml")
        ]
        assert {key: axis for key, axis in vary[0].items() if key != "text"} == {
            key: axis for key, axis in vary[1].items() if key != "text"
        }
        arms = vary[0].get("arm") or vary[0]["compensation"]
        loose = [label for label, arm in arms.items() if "least_squares" in str(arm) and "ridge" not in str(arm)]
        assert loose == [label for label in arms if label.endswith("ridge auto") or label.startswith("reconstruct")]


def test_links_lead_somewhere():
    headings = {
        re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        file, _, anchor = target.partition("#")
        if not file:
            assert anchor in headings, target
        elif not file.startswith("results/"):  # written by the run that the page speaks of
            assert (DOCS / file).is_file(), target
