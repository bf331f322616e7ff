"""The schemas of docs/schema and the YAML reference are those of the code, and every example file names its schema."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from prunekit.compress.cli.reference import reference
from prunekit.compress.cli.schema import NO_OPTION, ablation_schema, pipeline_schema, without_installed
from prunekit.registry import ROLES, Catalog, Entry

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCHEMAS = DOCS / "schema"
FOLDERS = {path.parent for path in DOCS.rglob("*.yaml") if not (path.parent / "pyproject.toml").exists()}
FILES = [path for folder in sorted(FOLDERS) if folder.name != "tasks" for path in sorted(folder.glob("*.yaml"))]
"""Pipeline and ablation files; not lm-eval's in folders called tasks, nor those that name components of a package."""
MADE = {"pipeline": pipeline_schema, "ablation": ablation_schema}
PAGE = (DOCS / "yaml-reference.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def catalog():
    return without_installed(Catalog.discover(block=""))


@pytest.mark.parametrize("kind", MADE)
def test_the_published_schema_is_that_of_the_code(catalog, kind):
    published = (SCHEMAS / f"{kind}.schema.json").read_text(encoding="utf-8")
    assert published == json.dumps(MADE[kind](catalog), indent=2) + "\n", "make reference writes it anew"


def test_the_published_reference_is_that_of_the_code(catalog):
    assert reference(catalog) == PAGE, "make reference writes it anew"


def test_every_component_and_option_is_in_the_reference_with_its_meaning(catalog):
    for role in ROLES:
        for entry in catalog.of_role(role) if role not in NO_OPTION else ():
            section = PAGE.split(f"\n## {role.replace('_', ' ').capitalize()}\n")[1].split("\n## ")[0]
            assert f"\n### `{entry.name}`\n" in section
            options = set(entry.component.model_fields) - {"name"}
            assert [option for option in options if f"| `{option}` |" not in section] == []
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 150 and [row for row in rows if not all(row)] == []


def test_installed_plugins_are_left_out_and_plugin_files_are_not(catalog):
    (scorer,) = [entry for entry in catalog.entries if (entry.role, entry.name) == ("scorers", "ppsp")]
    class_of = type("Mine", (scorer.component,), {"__module__": "mine", "__annotations__": {}})
    added = [Entry("scorers", "mine", class_of, "mine", provider) for provider in ("mine 1.0", "file mine.py")]
    found = without_installed(replace(catalog, entries=[*catalog.entries, *added]))
    assert [entry.provider for entry in found.entries if entry.name == "mine"] == ["file mine.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DOCS)))
def test_every_example_names_its_schema_and_fits_it(fits_schema, path):
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named, "the first line is not # yaml-language-server: $schema=PATH"
    schema = (path.parent / named[1]).resolve()
    assert schema.parent == SCHEMAS and schema.is_file()
    data = yaml.safe_load(text)
    assert schema.name == ("ablation" if "base" in data else "pipeline") + ".schema.json"
    assert fits_schema[schema.name.partition(".")[0]](data)


def test_the_schemas_refuse_a_wrong_key(fits_schema):
    assert not fits_schema["pipeline"]({"prune": {"use": "pp", "ration": 0.4}})
    assert not fits_schema["ablation"]({"base": {"prune": {"use": "pp"}}, "vry": {}})
