"""An exported folder that is named as a model, to be measured or pruned like any other."""

from __future__ import annotations

from pathlib import Path

from ..architectures import PRUNED
from . import classes
from .manifest import MANIFEST, damages, raise_damages, read_manifest


def prepare(place: str, revision: str | None = None, check: bool = True) -> None:
    """Compare an exported folder with its manifest, if ``check``, and have transformers know its model classes.

    ``place`` is a folder or a hub id; nothing happens for models that prunekit has not written. Raises
    :class:`DataError` for files that are not those that were written.
    """
    folder = Path(place)
    if check and (folder / MANIFEST).is_file():
        raise_damages(folder, damages(folder, read_manifest(folder)))
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(place, **({} if revision is None else {"revision": revision}))
    except Exception:  # any fault is reported when the model is loaded
        return
    if str(config.get("model_type", "")).startswith(PRUNED):
        classes.register()
