"""The page on pipeline files is complete, and every example file is valid."""

from pathlib import Path

import pytest
from prunekit.compress.files.spec import PipelineSpec

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "docs" / "examples").glob("*.yaml"))
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pipeline-files.md").read_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid_and_resolves_to_itself(path, tmp_path):
    spec = PipelineSpec.load(path)
    again = tmp_path / "resolved.yaml"
    again.write_text(spec.to_yaml())
    assert (
        PipelineSpec.load(again).model_dump()
        == spec.model_copy(update={"output": spec.output.model_copy(update={"dir": None})}).model_dump()
    )


def test_the_page_names_every_section_and_key():
    for name, info in PipelineSpec.model_fields.items():
        assert f"\n## `{name}`\n" in PAGE
        if name in ("model", "calibration", "output"):
            section = PAGE.split(f"\n## `{name}`\n")[1].split("\n## ")[0]
            for key in info.annotation.model_fields:
                assert f"`{key}`" in section, f"{name}.{key}"
