"""The base model's licence: its name from the model card, its files as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..bundled import MODEL
from ..models.loading import ModelSource

UNKNOWN = "unknown"
FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def licence_of(source: ModelSource) -> str:
    """The licence in the base model's card, an identifier of the hub such as ``mit``; "unknown" if there is none."""
    if source.name is None:
        return "mit"
    from huggingface_hub import ModelCard

    folder = Path(source.name).expanduser()
    readme = folder / "README.md"
    if folder.is_dir() and not readme.is_file():
        return UNKNOWN
    try:
        found = ModelCard.load(readme if folder.is_dir() else source.name).data.to_dict().get("license")
    except Exception:  # no card, no network, invalid metadata: the licence is not known
        return UNKNOWN
    return found if isinstance(found, str) and found else UNKNOWN


def copy_licence_files(source: ModelSource, folder: Path) -> None:
    """Copy licence and notice files of a base model in a local folder."""
    base = MODEL if source.name is None else Path(source.name).expanduser()
    for pattern in FILES if base.is_dir() else ():
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
