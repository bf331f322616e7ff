"""The base model's licence: its name from the model card, its files as they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..bundled import MODEL
from ..models.named import MODELS
from ..models.origin import is_own
from ..models.source import ModelSource

UNKNOWN = "unknown"
FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def licence_of(source: ModelSource) -> str:
    """The licence in the base model's card, an identifier of the hub such as ``mit``; "unknown" if there is none.

    A card that is a link out of the model's folder is not read, and other text is not taken.
    """
    if source.name is None:
        return "mit"
    if source.name in MODELS:
        return MODELS[source.name].licence
    from huggingface_hub import ModelCard

    folder = Path(source.name).expanduser()
    readme = folder / "README.md"
    if folder.is_dir() and not is_own(readme, folder):
        return UNKNOWN
    try:
        found = ModelCard.load(readme if folder.is_dir() else source.name).data.to_dict().get("license")
    except Exception:  # no card, no network, invalid metadata: the licence is not known
        return UNKNOWN
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,64}", found, re.ASCII) else UNKNOWN


def copy_licence_files(source: ModelSource, folder: Path) -> list[str]:
    """Copy licence and notice files of a base model in a local folder.

    Returns a note for each that is a link out of that folder, which is not copied.
    """
    base = MODEL if source.name is None else Path(source.name).expanduser()
    notes = []
    for pattern in FILES if base.is_dir() else ():
        for path in sorted(base.glob(pattern)):
            if is_own(path, base):
                shutil.copyfile(path, folder / path.name)
            elif not path.is_dir():
                notes.append(f"{path.name} of the base model is not copied: it is a link to a file outside its folder")
    return notes
