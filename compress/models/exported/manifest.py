"""The files that describe an exported folder: the manifest with sizes and hashes, and the kept units."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, ValidationError

from ....registry import DataError, SiteKind
from ...output.folders import sha256_of, write_json
from ...output.reading import brief, read_json
from ...output.records import (
    MOST_LAYERS,
    CalibrationFacts,
    CompensationFacts,
    LayerCut,
    ModelFacts,
    Plain,
    Ratio,
    Record,
    Training,
    Values,
)
from ..origin import READ, is_own

FORMAT: Literal["prunekit export 1"] = "prunekit export 1"
"""Name and number of the manifest's format."""

MANIFEST, RECIPE, KEPT, CARD = "prunekit.json", "recipe.yaml", "kept_units.json", "README.md"

GGUF = "model.gguf"

Kept = Mapping[tuple[int, SiteKind], tuple[int, ...]]
"""Kept units by layer and kind, ascending."""


class FileFacts(Record):
    """Size and content of a file."""

    bytes: int
    sha256: str


class ExportOptions(Record):
    """The options of ``prunekit export`` that change what is written."""

    multiple: int | None = None
    freeze: str | None = None
    shard_size: str = "5GB"


class Frozen(Record):
    """How decisions per batch were replaced by one."""

    how: str
    meaning: str


class ExportMetric(Record):
    """The values of one evaluator: of the dense model, and of the exported one."""

    label: str
    dense: Values
    per_batch: Values | None = None
    """Before the decisions per batch were frozen."""
    evaluator: Plain
    """Name and options."""
    protocol: Plain
    exported: Values
    before_recovery: Values | None = None


class ScoreKept(Record):
    """Share of the units that is cut, and share of the score that is kept, as means over sites."""

    units_cut: float
    score_kept: float | None
    """``None`` if calibration gives no scores."""


class Rounding(Record):
    """The effect of a format's constraint on the numbers of kept units."""

    equal: bool
    multiple: int
    asked: ScoreKept
    """Without the constraint."""
    achieved: ScoreKept
    sites_changed: int
    sites: int


class Parameters(Record):
    """Parameters of the dense model, of the units in use, and of the written model."""

    dense: int
    active: int
    exported: int


class LogitCheck(Record):
    """The comparison of the written model's logits with those of the pruned model."""

    logits: Literal["equal", "close"]
    largest_difference: float
    tokens: int


class RunFacts(Record):
    """The pipeline run with the same cut, and its measurements."""

    started: str
    metrics: list[Plain]


class Manifest(Record):
    """The content of prunekit.json."""

    format: Literal["prunekit export 1"] = FORMAT
    profile: str
    created: str
    """ISO 8601, UTC."""
    strategy: str
    options: ExportOptions
    freeze: Frozen | None = None
    recovery: Training | None = None
    requires: dict[str, str]
    """Packages that load the model, and their oldest versions."""
    base: ModelFacts
    license: str
    calibration: CalibrationFacts | None = None
    seeds: dict[str, int]
    versions: dict[str, str]
    plugins: dict[str, list[str]] = Field(default_factory=dict)
    plugin_files: list[str] = Field(default_factory=list)
    metrics: list[ExportMetric]
    ratio: Ratio
    compensation: CompensationFacts | None = None
    attention_unit: str
    layers: list[LayerCut] = Field(max_length=MOST_LAYERS)
    rounding: Rounding | None = None
    parameters: Parameters
    weights: str | None
    """Fingerprint of the written weights; ``None`` for a GGUF."""
    check: LogitCheck | None = None
    run: RunFacts | None = None
    notes: list[str]
    files: dict[str, FileFacts]
    """By path within the folder; all files but the manifest."""


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest with size and sha256 of every other file, and return it; it is the last file to write."""
    paths = {name: folder / name for name in _names(folder) if name != MANIFEST}
    files = {name: FileFacts(bytes=path.stat().st_size, sha256=sha256_of(path)) for name, path in paths.items()}
    manifest = manifest.model_copy(update={"format": FORMAT, "files": files})
    write_json(folder / MANIFEST, manifest.as_json())
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Raises :class:`DataError` for a folder without one, and for a manifest that is damaged or of another format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name one that prunekit export wrote")
    try:
        data = read_json(path)
    except FileNotFoundError:
        run = (folder / "results.json").is_file()
        remedy = "it is a results folder, so export it first (prunekit export)" if run else "name one that is"
        raise DataError(f"{folder} has no {MANIFEST}, so it is not a finished export; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); export the model again") from error
    data = data if isinstance(data, dict) else {}
    if data.get("format") != FORMAT:
        versions = data.get("versions")
        version = versions.get("prunekit", "unknown") if isinstance(versions, dict) else "unknown"
        raise DataError(
            f"{path}: format {data.get('format')!r}, expected {FORMAT!r}; use the prunekit that wrote it "
            f"({version}), or export the model again"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(
            f"{path} is damaged ({brief(place)} is not what an export writes); export the model again"
        ) from None
    outside = [name for name in manifest.files if PurePosixPath(name).is_absolute() or ".." in name.split("/")]
    if outside:
        raise DataError(f"{path} lists {outside[0]}, which is outside of the folder; it was not written by prunekit")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise :class:`DataError` naming the first files that differ from the manifest; all bytes are read."""
    found = damages(folder, manifest)
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise DataError(
            f"{folder}: {'; '.join(found[:3])}{more}; copy the folder again from where it was whole, or export it again"
        )


def damages(folder: Path, manifest: Manifest) -> list[str]:
    """One sentence for every file that is missing, that has another size or content, or that is not listed."""
    found = []
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif not is_own(path, folder):
            found.append(f"{name} is a link to a file outside of the folder")
        elif path.stat().st_size != expected.bytes:
            found.append(f"{name} has {path.stat().st_size:,} bytes, {expected.bytes:,} were written")
        elif sha256_of(path) != expected.sha256:
            found.append(f"{name} has changed since it was written (sha256 differs)")
    listed = {*manifest.files, MANIFEST}
    more = [name for name in _names(folder) if name not in listed and name.endswith(READ)]
    # Names with a dot first are those of a hub's or git's own files.
    return found + [f"{name} was not written by the export" for name in more if not name.startswith(".")]


def write_kept(folder: Path, kept: Kept) -> None:
    """Write the kept units by layer and kind, one layer on a line."""
    layers: dict[int, dict[str, Any]] = {}
    for (layer, kind), units in sorted(kept.items()):
        layers.setdefault(layer, {"layer": layer})[kind] = list(units)
    lines = ",\n".join(json.dumps(layers[layer], separators=(",", ":")) for layer in sorted(layers))
    (folder / KEPT).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_kept(folder: Path) -> Kept | None:
    """The kept units; None for a folder without them, such as one whose cut is made per batch."""
    path = folder / KEPT
    if not path.is_file():
        return None
    try:
        layers = read_json(path)
        return {(e["layer"], kind): tuple(e[kind]) for e in layers for kind in e if kind != "layer"}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}); export the model again") from error


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
