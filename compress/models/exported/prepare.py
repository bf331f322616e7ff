"""Prepares the loading of an exported folder that is named as a model."""

from __future__ import annotations

from pathlib import Path

from ..architectures import PRUNED
from . import classes
from .manifest import MANIFEST, check_files, read_manifest


def prepare(place: str, revision: str | None = None, check: bool = True) -> None:
    """Compare an exported folder with its manifest, if ``check``, and register its model classes with transformers.

    ``place`` is a folder or a hub id; nothing happens for models that prunekit has not written. Raises
    :class:`DataError` for files that differ from the written ones.
    """
    folder = Path(place)
    if check and (folder / MANIFEST).is_file():
        check_files(folder, read_manifest(folder))
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(place, **({} if revision is None else {"revision": revision}))
    except Exception:  # loading the model reports what is wrong
        return
    if str(config.get("model_type", "")).startswith(PRUNED):
        classes.register()
