"""docs/public-names.md names what the public modules export, and all pages and examples import nothing else."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from prunekit.registry import Catalog

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "public-names.md").read_text(encoding="utf-8")


def places(page: str) -> dict[str, list[str]]:
    """The names that a page lists for each public module."""
    sections = re.findall(r"^## `(prunekit[\w.]*)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    rows = {place: re.findall(r"^\|[^|]*\|([^|]*)\|$", text, re.MULTILINE) for place, text in sections}
    return {place: re.findall(r"`(\w+)`", " ".join(names)) for place, names in rows.items()}


PLACES = places(PAGE)


def test_the_page_names_what_the_modules_export():
    assert len(PLACES) == 6
    for place, listed in PLACES.items():
        module = importlib.import_module(place)
        assert sorted(listed) == sorted(module.__all__), place
        assert [name for name in listed if not hasattr(module, name)] == []


def test_every_built_in_component_is_public():
    """`prunekit show` prints the same import line; architectures are rows of a table."""
    entries = [each for each in Catalog.discover(block="").entries if each.provider.startswith("prunekit ")]
    lines = {
        entry.import_line: f"from {place} import {entry.component.__name__}"
        for entry in entries
        if entry.role != "architectures"
        for place in ("prunekit.registry", "prunekit.strategies", "prunekit.evaluators")
        if entry.component.__name__ in PLACES[place]
    }
    assert len(lines) == sum(entry.role != "architectures" for entry in entries)
    assert list(lines) == list(lines.values())


@pytest.mark.parametrize(
    "line",
    [
        "from prunekit.strategies.pp import PP, HiddenNorm, ProbePruning, SpreadProbe, WholeBatch",
        "from prunekit.strategies.pp.mergers import MovingAverage",
        "from prunekit.strategies.allocation import Explicit, Uniform",
        "from prunekit.strategies.application import Slice, Zero",
        "from prunekit.strategies.compensation import LeastSquares, Mean, ProbedMean",
        "from prunekit.strategies.flap import Flap, FluctuationScorer, GlobalAdaptive",
        "from prunekit.strategies.layers import LayerShares",
        "from prunekit.strategies.wanda_sp import WandaSp, WandaSpScorer",
        "from prunekit.strategies.reference import PPReference, Wifn",
        "from prunekit.compress.models.architectures import AttentionNames, Llama, MlpNames, PreNormDecoder",
        "from prunekit.compress.models.families import family",
        "from prunekit.compress.ablation.store import Store",
        "from prunekit.compress.runs.records import read_results",
    ],
)
def test_imports_that_earlier_pages_named_still_work(line):
    exec(line, {})


def private_imports(source: str) -> list[str]:
    """What a source imports from prunekit that is not on the page."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (place := node.module or "").partition(".")[0] == "prunekit":
            found += [f"{place}.{each.name}" for each in node.names if each.name not in PLACES.get(place, ())]
        elif isinstance(node, ast.Import):
            names = [each.name for each in node.names if each.name.startswith("prunekit.")]
            found += [name for name in names if name not in PLACES]
    return found


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_pages_import_public_names(path):
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [name for block in blocks for name in private_imports(block)] == []


def test_examples_import_public_names():
    sources = sorted((DOCS / "examples").rglob("*.py"))
    assert sources and [name for path in sources for name in private_imports(path.read_text("utf-8"))] == []


def test_a_private_import_is_found():
    assert private_imports("from prunekit.registry import Scorer, wrong_signature\nimport prunekit.compress.cli") == [
        "prunekit.registry.wrong_signature",
        "prunekit.compress.cli",
    ]
