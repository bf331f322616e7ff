"""The page on ablations and the example: complete and valid, by the reader and by the JSON Schema."""

import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from prunekit.compress.ablation.store import LAYOUT
from prunekit.compress.ablation.study import Published, Study, StudyFile
from prunekit.compress.cli.schema import ablation_schema
from prunekit.registry import Catalog

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "ablations.md").read_text()
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def valid():
    """Whether data fits the JSON Schema of ablation files."""
    schema = ablation_schema(Catalog.discover())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid


@pytest.mark.parametrize("block", BLOCKS)
def test_the_pages_examples_are_valid(tmp_path, valid, block):
    path = tmp_path / "study.yaml"
    path.write_text(block)
    assert len(Study.load(path).trials) > 1
    assert valid(yaml.safe_load(block))


def test_the_example_is_valid(valid):
    study = Study.load(DOCS / "examples" / "ablations" / "seeds.yaml")
    assert len(study.trials) == 2 * (1 + 3 * 3 * 2) + 1
    assert valid(yaml.safe_load(study.describe().text))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"base": {"prune": {}}, "vray": {}},
        {"base": {"prunes": {}}},
        {"base": {}, "vary": {"prune.ratio": 0.2}},
        {"base": {}, "vary": {"text": []}},
        {"base": {}, "published": [{"metric": "a.b"}]},
    ],
)
def test_the_schema_refuses(valid, data):
    assert not valid(data)


def test_the_page_names_every_key_and_column():
    for name in (*StudyFile.model_fields, *Published.model_fields, *re.findall(r"^    (\w+) ", LAYOUT, re.MULTILINE)):
        assert f"`{name}`" in PAGE or f"{name}: " in PAGE, name
