"""Loads exported folders: with transformers if the cut is made, with prunekit if it is made per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import DataError, ModelError, PluginError, SpecError
from ..files.spec import PipelineSpec
from ..files.yaml_plain import plain_data
from ..models.exported.manifest import GGUF, RECIPE, Manifest, check_files, read_manifest
from ..models.loading import Loaded, fingerprint
from ..models.loading import load as load_model
from ..models.source import ModelSource
from ..output.reading import read_text
from ..pruning.pruned import Pruned
from . import dynamic_state


@dataclass
class Export:
    """A loaded folder; ``pruned`` is the handle of a model that is pruned per batch."""

    model: Any
    tokenizer: Any
    pruned: Pruned | None
    manifest: Manifest
    folder: Path

    @property
    def loaded(self) -> Loaded:
        """Model and tokenizer in the form that the measurements take."""
        name = self.folder.name if self.pruned is None else self.manifest.base.name
        return Loaded(self.model, self.tokenizer, {"name": name, "revision": None, "commit": None})


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    base: str | None = None,
    plugins: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
    check: bool = True,
) -> Export:
    """A model that ``prunekit export`` wrote, in evaluation mode and without gradients.

    For profile ``dynamic`` it is the dense model, pruned per batch as it was; ``base`` is the new place of its dense
    weights if they have moved. No code from the folder runs: the model classes are prunekit's own, plugin files are
    those in ``plugins``, and a base model's own code runs only with ``trust_remote_code``. ``check`` compares the
    sha256 of every file, and the base's weights, with the manifest.

    Raises :class:`DataError` (missing, damaged or changed files), :class:`ModelError` (a transformers that is too old,
    a base that cannot be loaded), :class:`SpecError`, :class:`PluginError`.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if check:
        check_files(folder, manifest)
    if manifest.profile == "gguf":
        raise SpecError(
            f"{folder} holds a GGUF, which llama.cpp runs and transformers does not; load "
            f"{folder / GGUF} with llama_cpp.Llama, or export with --profile hf-hetero"
        )
    if manifest.profile != "dynamic":
        _check_transformers(manifest)
        loaded = load_model(source_of(folder, ModelSource(device=device)), check=False)
        return Export(loaded.model, loaded.tokenizer, None, manifest, folder)
    spec = recipe_of(folder, plugins)
    changes: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    if base is not None:
        changes |= {"name": base, "revision": None}
    if spec.model.trust_remote_code and not trust_remote_code:
        raise ModelError(
            f"{folder}: the base model {spec.model.label} needs Python code that comes with it; read that code, then "
            "pass trust_remote_code=True to run it"
        )
    loaded = load_model(spec.model.model_copy(update=changes))
    expected = manifest.base.fingerprint or ""
    if check and fingerprint(loaded.model) != expected:
        raise DataError(
            f"{folder}: the base model {base or spec.model.label} has other weights than this was exported from "
            f"(fingerprint {expected[:12]}...); name the right one with base, or export again"
        )
    pruned = dynamic_state.restore(loaded.model, spec.prune, spec.catalog, folder, spec.runtime)
    return Export(loaded.model, loaded.tokenizer, pruned, manifest, folder)


def source_of(folder: Path, like: ModelSource) -> ModelSource:
    """An exported folder as a model source, placed on devices as ``like``; no code from the folder runs."""
    changes = {"name": str(folder.resolve()), "dtype": "auto", "trust_remote_code": False}
    return like.model_copy(update=changes | dict.fromkeys(("gguf", "tokenizer", "revision")))


def recipe_of(folder: Path, plugins: Sequence[str | Path] = ()) -> PipelineSpec:
    """Model, strategy, runtime and seed of a folder's recipe.

    The plugin files are those in ``plugins``, never those that the recipe lists. Raises :class:`DataError` for a
    damaged recipe, :class:`SpecError` and :class:`PluginError` for one that does not fit the installed components.
    """
    path = folder / RECIPE
    try:
        data = plain_data(read_text(path), RECIPE)
        listed = data.pop("plugins", None) or []
        wanted = {key: data[key] for key in ("model", "prune", "runtime", "seed")}
        wanted["architecture"] = data.get("architecture")  # which older recipes do not have
    except (OSError, ValueError, SpecError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is missing or damaged ({type(error).__name__}: {error}); export again") from error
    try:
        return PipelineSpec.of(wanted, folder=folder, plugins=plugins, label=str(path))
    except (SpecError, PluginError) as error:
        if listed and not plugins:
            files = ", ".join(map(str, listed))
            kind = PluginError if isinstance(error, PluginError) else SpecError
            raise kind(
                f"{error}\nthe recipe was made with plugin files, which are run only where they are named: {files}"
            ) from error
        raise


def _check_transformers(manifest: Manifest) -> None:
    """Raise :class:`ModelError` if the installed transformers is older than the folder needs."""
    import transformers
    from packaging.version import Version

    needed = manifest.requires.get("transformers")
    if needed is not None and Version(transformers.__version__) < Version(needed):
        raise ModelError(
            f"this export needs transformers {needed} or newer, {transformers.__version__} is installed; install a "
            "newer one, or export with --profile hf-uniform"
        )
