"""The base model's licence, carried over: its name from the model card, its files as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..bundled import MODEL
from ..models.loading import ModelSource

UNKNOWN = "unknown"
FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def licence_of(source: ModelSource) -> str:
    """What the base model's card says, an identifier of the hub's such as ``mit``; "unknown" where it says nothing."""
    if source.name is None:
        return "mit"
    from huggingface_hub import ModelCard

    folder = Path(source.name).expanduser()
    place: Any = folder / "README.md" if folder.is_dir() else source.name
    if isinstance(place, Path) and not place.is_file():
        return UNKNOWN
    try:
        found = ModelCard.load(place).data.to_dict().get("license")
    except Exception:  # no card, no network, metadata that is none: all mean that nothing is known
        return UNKNOWN
    return found if isinstance(found, str) and found else UNKNOWN


def copy_licence_files(source: ModelSource, folder: Path) -> None:
    """Copy licence and notice files of a base model that lies in a folder."""
    base = MODEL if source.name is None else Path(source.name).expanduser()
    if not base.is_dir():
        return
    for pattern in FILES:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
