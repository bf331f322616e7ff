"""What every exported folder carries besides the model: a manifest with hashes, the recipe, the kept units."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any

from ....registry import DataError
from ...output.folders import write_json

FORMAT = "prunekit export 1"

MANIFEST, RECIPE, KEPT, CARD = "prunekit.json", "recipe.yaml", "kept_units.json", "README.md"

GGUF = "model.gguf"

PARTS: dict[str, type | tuple[type, ...]] = {
    "profile": str,
    "strategy": str,
    "files": dict,
    "base": dict,
    "options": dict,
    "requires": dict,
    "versions": dict,
    "seeds": dict,
    "ratio": dict,
    "parameters": dict,
    "layers": list,
    "metrics": list,
    "notes": list,
    "weights": (str, NoneType),
}
"""What a manifest holds whatever the profile, and of what kind it is."""


def write_kept(folder: Path, kept: Mapping[tuple[int, str], tuple[int, ...]]) -> None:
    """Write the kept units by layer and kind, one layer on a line."""
    layers: dict[int, dict[str, Any]] = {}
    for (layer, kind), units in sorted(kept.items()):
        layers.setdefault(layer, {"layer": layer})[kind] = list(units)
    lines = ",\n".join(json.dumps(layers[layer], separators=(",", ":")) for layer in sorted(layers))
    (folder / KEPT).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def read_kept(folder: Path) -> dict[tuple[int, str], tuple[int, ...]] | None:
    """The kept units by layer and kind; None where the folder lists none, as one whose cut is made per batch."""
    path = folder / KEPT
    if not path.is_file():
        return None
    try:
        layers = json.loads(path.read_text(encoding="utf-8"))
        return {(e["layer"], kind): tuple(e[kind]) for e in layers for kind in e if kind != "layer"}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} is damaged ({error}); export the model again") from error


def finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the size and sha256 of every other file; it comes last."""
    files = {name: _described(folder / name) for name in _names(folder) if name != MANIFEST}
    manifest["files"] = files
    write_json(folder / MANIFEST, {"format": FORMAT, **manifest})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder; raises :class:`DataError` for what is none, or one of another version."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; name one that prunekit export wrote")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST}, so it is not a finished export; name one that is") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}); export the model again") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise DataError(
            f"{path}: format {found!r}, expected {FORMAT!r}; use the prunekit that wrote it "
            f"({_version(manifest)}), or export the model again"
        )
    damaged = [key for key, kind in PARTS.items() if not isinstance(manifest.get(key, ...), kind)]
    if damaged or not all(isinstance(f, dict) and {"bytes", "sha256"} <= set(f) for f in manifest["files"].values()):
        what = damaged[0] if damaged else "files"
        raise DataError(f"{path} is damaged ({what} is not what an export writes); export the model again")
    outside = [name for name in manifest["files"] if PurePosixPath(name).is_absolute() or ".." in name.split("/")]
    if outside:
        raise DataError(f"{path} lists {outside[0]}, which is outside of the folder; it was not written by prunekit")
    return manifest


def damages(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """One sentence for every file that is missing, of another size or content, or too much; all bytes are read."""
    found = []
    listed = manifest["files"]
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{name} has {path.stat().st_size:,} bytes, {expected['bytes']:,} were written")
        elif sha256(path) != expected["sha256"]:
            found.append(f"{name} has changed since it was written (sha256 differs)")
    read = (".safetensors", ".gguf", ".bin", ".pt", ".py", ".json", ".jinja", ".model", ".txt", ".yaml")
    more = [name for name in _names(folder) if name not in listed and name != MANIFEST and name.endswith(read)]
    more = [name for name in more if not name.startswith(".")]  # what a hub or git keeps for itself
    return found + [f"{name} was not written by the export" for name in more]


def raise_damages(folder: Path, found: list[str]) -> None:
    """Raise :class:`DataError` naming the first of a folder's damages."""
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise DataError(
            f"{folder}: {'; '.join(found[:3])}{more}; copy the folder again from where it was whole, or export it again"
        )


def sha256(path: Path) -> str:
    """Of a file's content."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


def _described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())


def _version(manifest: Any) -> str:
    versions = manifest.get("versions") if isinstance(manifest, dict) else None
    return str(versions.get("prunekit", "unknown")) if isinstance(versions, dict) else "unknown"
