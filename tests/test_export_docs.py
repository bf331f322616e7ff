"""The pages on exports say what the code does; every option of the command line is on a page."""

import re
from pathlib import Path

import pytest
from prunekit.compress.cli.main import app
from prunekit.compress.export.profiles import PROFILES
from prunekit.compress.export.vllm_plugin import ARCHITECTURES
from prunekit.compress.models.exported.manifest import KEPT, MANIFEST, RECIPE
from prunekit.compress.models.exported.modeling_prunekit import OLDEST
from prunekit.compress.pruning.freezing import MEANINGS
from prunekit.compress.recovery.recovering import REASONS
from typer.main import get_command

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("export", "recovery", "quantization")}
README = (DOCS.parent / "README.md").read_text()


def test_the_table_of_profiles_is_that_of_the_command():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGES["export"].splitlines()]
    for profile in PROFILES:
        (row,) = [row for row in rows if row[0] == f"`{profile.name}`"]
        assert tuple(row[-4:]) == profile.runs
        assert f"\n### `{profile.name}`\n" in PAGES["export"]


def test_ways_to_freeze_files_and_versions_are_named():
    for how, meaning in MEANINGS.items():
        assert f"| `{how}` | {meaning} |" in PAGES["export"]
    for name in (MANIFEST, RECIPE, KEPT):
        assert f"| `{name}` |" in PAGES["export"]
    assert f"transformers {OLDEST}" in PAGES["export"]
    for profile in REASONS:
        assert f"`{profile}`" in PAGES["recovery"]
    served = [name.removeprefix("Prunekit").removesuffix("ForCausalLM") for name in ARCHITECTURES]
    assert all(family in PAGES["export"] for family in served)


@pytest.mark.parametrize("page", [*PAGES, "README"])
def test_every_option_exists(page):
    text = PAGES.get(page, README)
    commands = get_command(app).commands
    known = {option for command in commands.values() for parameter in command.params for option in parameter.opts}
    elsewhere = {"--field", "--overwrite", "--index-url"}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= known | elsewhere, named - known
    recover = {option for parameter in commands["recover"].params for option in parameter.opts}
    if page == "recovery":
        assert recover - {"--out", "--plugin", "--overwrite"} <= named | {"DIR", "folder"}, recover - named


def test_every_command_and_option_is_on_a_page():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in [DOCS.parent / "README.md", *DOCS.rglob("*.md")])
    words = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", pages))
    missing = []
    for name, command in get_command(app).commands.items():
        missing += [] if re.search(rf"prunekit {name}\b", pages) else [name]
        for option in (parameter for parameter in command.params if parameter.param_type_name == "option"):
            known = {text for text in (*option.opts, *option.secondary_opts) if text.startswith("--")}
            missing += [] if known & words else [f"{name} {option.opts}"]
    assert missing == []
