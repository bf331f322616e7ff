"""Exported folders as models again: by transformers where the cut is made, by prunekit where it is made per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...registry import DataError, ModelError, PluginError, SpecError
from ..files.spec import PipelineSpec
from ..models.exported.manifest import GGUF, RECIPE, damages, raise_damages, read_manifest
from ..models.loading import Loaded, ModelSource, fingerprint
from ..models.loading import load as load_model
from ..pruning.pruned import Pruned
from . import dynamic_state


@dataclass
class Export:
    """An exported folder that was loaded: ``pruned`` is there where the cut is made per batch."""

    model: Any
    tokenizer: Any
    pruned: Pruned | None
    manifest: dict[str, Any]
    folder: Path

    @property
    def loaded(self) -> Loaded:
        """Model and tokenizer as everything else takes them."""
        name = self.folder.name if self.pruned is None else self.manifest["base"]["name"]
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

    One of profile ``dynamic`` is the dense model, pruned per batch as it was; ``base`` is where its dense weights are
    now, if they have moved. No code from the folder is run: model classes are prunekit's own, plugin files are those in
    ``plugins``, and a base model's own code runs only with ``trust_remote_code``. With ``check``, every file's sha256
    and the base's weights are compared with what was written.

    Raises :class:`DataError` (missing, damaged or changed files), :class:`ModelError` (a transformers that is too old,
    a base that cannot be loaded), :class:`SpecError`, :class:`PluginError`.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    if check:
        raise_damages(folder, damages(folder, manifest))
    return load_described(folder, manifest, device, base, plugins, trust_remote_code, check)


def load_described(
    folder: Path,
    manifest: dict[str, Any],
    device: str = "auto",
    base: str | None = None,
    plugins: Sequence[str | Path] = (),
    trust_remote_code: bool = False,
    check_base: bool = True,
) -> Export:
    """What :func:`load` gives, of a folder whose manifest was read and whose files were compared with it."""
    if manifest["profile"] == "dynamic":
        return _load_dynamic(folder, manifest, device, base, plugins, trust_remote_code, check_base)
    if manifest["profile"] == "gguf":
        raise SpecError(
            f"{folder} holds a GGUF, which llama.cpp runs and transformers does not; load "
            f"{folder / GGUF} with llama_cpp.Llama, or export with --profile hf-hetero"
        )
    check_transformers(manifest)
    return Export(*model_in(ModelSource(device=device, **of_folder(folder))), None, manifest, folder)


def of_folder(folder: Path) -> dict[str, Any]:
    """Where a model source finds an exported folder's model: no code of the folder's is run."""
    return {"name": str(folder.resolve()), "revision": None, "dtype": "auto", "trust_remote_code": False}


def model_in(source: ModelSource) -> tuple[Any, Any]:
    """Model and tokenizer of a source."""
    loaded = load_model(source, check=False)
    return loaded.model, loaded.tokenizer


def restored(folder: Path, spec: PipelineSpec, loaded: Loaded) -> Export:
    """The dense model ``loaded``, pruned per batch as a folder of profile ``dynamic`` has it."""
    pruned = dynamic_state.restore(loaded.model, spec.prune, spec.catalog, folder, spec.runtime)
    return Export(loaded.model, loaded.tokenizer, pruned, {"base": loaded.identity}, folder)


def check_transformers(manifest: dict[str, Any]) -> None:
    """Raise :class:`ModelError` where the installed transformers is older than a folder needs."""
    import transformers
    from packaging.version import Version

    needed = manifest["requires"].get("transformers")
    if needed is not None and Version(transformers.__version__) < Version(needed):
        raise ModelError(
            f"this export needs transformers {needed} or newer, {transformers.__version__} is installed; install a "
            "newer one, or export with --profile hf-uniform"
        )


def _load_dynamic(
    folder: Path,
    manifest: dict[str, Any],
    device: str,
    base: str | None,
    plugins: Sequence[str | Path],
    trust_remote_code: bool,
    check_base: bool,
) -> Export:
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
    expected = manifest["base"]["fingerprint"]
    if check_base and fingerprint(loaded.model) != expected:
        raise DataError(
            f"{folder}: the base model {base or spec.model.label} has other weights than this was exported from "
            f"(fingerprint {expected[:12]}...); name the right one with base, or export again"
        )
    found = restored(folder, spec, loaded)
    found.manifest = manifest
    return found


def recipe_of(folder: Path, plugins: Sequence[str | Path] = (), everything: bool = False) -> PipelineSpec:
    """The recipe of an exported folder; its plugin files are those that the caller names, never those it lists.

    ``everything`` reads texts and evaluators too, which must then be there; else the model and the strategy alone.
    """
    path = folder / RECIPE
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        listed = data.pop("plugins", None) or []
        wanted = data if everything else {key: data[key] for key in ("model", "prune", "runtime", "seed")}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path} is missing or damaged ({type(error).__name__}: {error}); export again") from error
    try:
        return PipelineSpec.of(wanted, folder=folder, plugins=plugins, label=str(path))
    except (SpecError, PluginError) as error:
        if listed and not plugins:
            files = ", ".join(map(str, listed))
            raise type(error)(
                f"{error}\nthe recipe was made with plugin files, which are run only where they are named: {files}"
            ) from error
        raise
