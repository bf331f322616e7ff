"""Folders of format 1 that prunekit 0.1.0 wrote; tests/format1 holds them.

``recovered`` is of profile hf-uniform, frozen and recovered; ``dynamic`` is PP on the bundled model.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from prunekit.compress import load
from prunekit.compress.export.card import card
from prunekit.compress.models.exported.manifest import CARD, MANIFEST, Manifest, read_manifest, write_manifest
from prunekit.registry import DataError

OLD = Path(__file__).parent / "format1"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(OLD / "recovered", tmp_path / "recovered")
    return tmp_path / "recovered"


def test_a_folder_loads(folder):
    found = load(folder)
    assert found.manifest.recovery.rank == 8 and found.manifest.freeze.how == "mean-score"
    assert sum(parameter.numel() for parameter in found.model.parameters()) == found.manifest.parameters.exported
    assert torch.isfinite(found.model(torch.tensor([[1, 5, 9]])).logits).all()


def test_a_folder_is_verified(folder, command):
    code, output = command("verify", folder)
    assert code == 0 and "files holds" in output and "perplexity holds" in output, output


def test_a_dynamic_folder_loads_and_computes_as_before():
    """The sums of two batches' logits are those of 0.1.0; the second batch sees the updated history."""
    found = load(OLD / "dynamic")
    assert found.pruned.strategy.name == "pp" and found.pruned.strategy.dynamic
    ids = torch.tensor([[0, 5, 6, 7, 9, 11, 40, 50]])
    sums = [float(found.model(ids).logits.sum()) for _ in range(2)]
    assert sums == pytest.approx([-129565.688, -129559.281], rel=1e-5)


@pytest.mark.parametrize("name", ["recovered", "dynamic"])
def test_nothing_of_a_manifest_is_lost(name, tmp_path):
    """Keys that this version does not know are kept, too."""
    data = {**json.loads((OLD / name / MANIFEST).read_text()), "of_a_later_version": [1, 2]}
    manifest = Manifest.model_validate(data)
    assert manifest.as_json() == data
    (tmp_path / CARD).write_text("card")
    again = write_manifest(tmp_path, manifest)
    assert list(again.files) == [CARD] and read_manifest(tmp_path) == again
    written = json.loads((tmp_path / MANIFEST).read_text())
    assert list(written) == list(data) and {**written, "files": data["files"]} == data


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "recovered",
            {
                "What was dropped is given back by compensation `mean`.": (
                    "The contribution of the dropped units is compensated by `mean`."
                )
            },
        ),
        ("dynamic", {", anew for every batch. ": ", separately for every batch. "}),
    ],
)
def test_the_card_is_the_same_but_for_its_english(name, changes):
    expected = (OLD / name / CARD).read_text()
    for old, new in changes.items():
        assert old in expected
        expected = expected.replace(old, new)
    expected = re.sub(r"(float\d+), weights (\w{12});", r"\1, fingerprint \2;", expected)
    assert card(read_manifest(OLD / name), name) == expected


def test_a_damaged_manifest_is_refused_in_one_sentence(folder):
    data = json.loads((folder / MANIFEST).read_text())
    del data["recovery"]["rank"]
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(
        DataError, match=r"is damaged \(recovery\.rank is not what an export writes\); export the model again$"
    ):
        load(folder)


def test_an_unknown_format_is_refused_with_the_version_that_wrote_it(folder):
    data = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**data, "format": "prunekit export 2"}))
    with pytest.raises(DataError, match=r"'prunekit export 2', expected .* use the prunekit that wrote it \(0.1.0\)"):
        load(folder)
