"""The page on ablations is complete; the example and the JSON Schema agree with the reader."""

import re
from pathlib import Path

import pytest
import yaml
from prunekit.compress.ablation.store import LAYOUT
from prunekit.compress.ablation.study import Published, Study, StudyFile

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "ablations.md").read_text()


def test_the_example_is_valid(fits_schema):
    study = Study.load(DOCS / "examples" / "ablations" / "seeds.yaml")
    assert len(study.trials) == 2 * (1 + 3 * 3 * 2) + 1
    assert fits_schema["ablation"](yaml.safe_load(study.describe().text))


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
def test_the_schema_refuses(fits_schema, data):
    assert not fits_schema["ablation"](data)


def test_the_page_names_every_key_and_column():
    for name in (*StudyFile.model_fields, *Published.model_fields, *re.findall(r"^    (\w+) ", LAYOUT, re.MULTILINE)):
        assert f"`{name}`" in PAGE or f"{name}: " in PAGE, name
