"""``pruned.save``: the smaller model of a handle, as a folder that transformers loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..output.folders import RunFolder
from ..pruning.pruned import Pruned
from .profiles import profile_named
from .writing import check_experts, write_model

SAVED = ("hf-hetero", "hf-uniform", "padded")
"""Profiles that need nothing but the model."""


def save(pruned: Pruned, folder: str | os.PathLike[str], profile: str, tokenizer: Any) -> Path:
    """Write the smaller model; :meth:`~prunekit.compress.Pruned.save` has the details."""
    chosen = profile_named(profile)
    if chosen.name not in SAVED:
        raise SpecError(
            f"pruned.save: profile {chosen.name} needs the pipeline file, which prunekit export takes; here there are "
            f"{', '.join(SAVED)}"
        )
    if pruned.strategy.dynamic:
        raise SpecError(
            f"pruned.save: strategy {pruned.strategy.name} decides per batch, and a file has one cut; call "
            "pruned.freeze(...) first, or write it with prunekit export --profile dynamic"
        )
    check_experts(chosen, pruned.all_sites)
    target = RunFolder(Path(folder), what="saved model")
    if os.path.lexists(target.target):
        raise SpecError(f"pruned.save: {target.target} exists; name a folder that does not exist yet")
    pruned.refresh()
    with target.open() as partial:
        write_model(chosen, pruned, tokenizer, partial)
    return target.target


Pruned._saver = staticmethod(save)
