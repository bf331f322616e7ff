"""What the files of a model may ask for: files of their own folder, and nothing but transformers' code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...registry import ModelError
from ..output.reading import brief, read_json, shown

READ = (".safetensors", ".gguf", ".bin", ".pt", ".py", ".json", ".jinja", ".model", ".txt", ".yaml")
"""Endings of files that a loader or an export reads."""

ADAPTER = "adapter_config.json"

ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")

ATTENTION = ("eager", "sdpa", "flex_attention")
"""transformers' own attention kernels, which need no other package."""

FLASH = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""Kernels of installed packages; transformers fetches them from the hub where the package is not installed."""


def is_own(path: Path, folder: Path) -> bool:
    """Whether ``path`` is a regular file in ``folder``, or in the hub cache among the blobs of its repository.

    Links are followed to where the content is.
    """
    try:
        folder, place = folder.resolve(), path.resolve()
    except (OSError, RuntimeError):  # a link to itself
        return False
    blobs = folder.parent.parent / "blobs"
    in_cache = folder.parent.name == "snapshots" and place.is_relative_to(blobs)
    return place.is_file() and (in_cache or place.is_relative_to(folder))


def check_folder(folder: Path) -> None:
    """Raise :class:`ModelError` for a file of a model's folder that is outside of it, and for a PEFT adapter."""
    names = [path for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")) if not path.is_dir()]
    for path in sorted(names):
        if path.name.endswith(READ) and not is_own(path, folder):
            raise ModelError(
                f"model.name: {path} is not a regular file of its folder, but a link to somewhere else; only files of "
                "the model's own folder are read. Put a copy of the file in the link's place (cp -L)"
            )
        if path.name.endswith(".index.json"):
            _check_index(path, folder)
    refuse_adapter(folder)


def refuse_adapter(folder: Path) -> None:
    """Raise :class:`ModelError` for a folder with a PEFT adapter."""
    if (folder / ADAPTER).is_file():
        raise adapter_found(str(folder), _base_of(folder / ADAPTER))


def adapter_found(place: str, base: str | None = None) -> ModelError:
    """The error for a PEFT adapter in the place of a model."""
    other = f"its base model {base}" if base else "its base model"
    return ModelError(
        f"model.name: {place} holds a PEFT adapter ({ADAPTER}), and layers with adapters cannot be cut; merge it first "
        f"(peft: merge_and_unload(), then save_pretrained to another folder), or name {other}"
    )


def check_config(config: Mapping[str, Any], label: str, attention: str | None) -> None:
    """Raise :class:`ModelError` for a config.json that asks for other code than transformers', or is quantised.

    ``attention`` is the user's choice, which replaces the config's own. ``auto_map`` is transformers' to check: it runs
    no code without ``trust_remote_code``.
    """
    for path, key, value in _entries(config):
        if value is None:
            continue
        place = f"config.json of {label}: {'.'.join((*path, key))}"
        if key in ATTENTION_KEYS and not (attention is not None and not path):
            for kernel in value.values() if isinstance(value, Mapping) else (value,):
                if kernel is not None and not _is_plain(kernel):
                    raise ModelError(
                        f"{place} is {shown(kernel)}, which is code that would be fetched from the hub or is not "
                        f"installed; it is not taken from a file. Set model.attention to sdpa or eager, or delete "
                        f"{key} from config.json"
                    )
        elif key == "fusion_config":
            raise ModelError(f"{place} would replace parts of the model by fused ones, which are not cut; delete it")
        elif key in ("quantization_config", "compression_config"):
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            raise ModelError(
                f"{place}: the weights are quantised ({shown(method or 'unknown method')}), and quantised layers "
                "cannot be cut; name the model's unquantised checkpoint"
            )


def _is_plain(kernel: Any) -> bool:
    package = FLASH.get(kernel) if isinstance(kernel, str) else None
    return kernel in ATTENTION or (package is not None and importlib.util.find_spec(package) is not None)


def _entries(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Every key of nested mappings and lists, with the keys above it and its value."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield path, str(key), value
            yield from _entries(value, (*path, str(key)))
    elif isinstance(data, list):
        for item in data:
            yield from _entries(item, path)


def _check_index(path: Path, folder: Path) -> None:
    try:
        files = set(read_json(path)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # transformers names what is wrong with the index that it uses
    for name in files:
        inside = isinstance(name, str) and ".." not in Path(name).parts and not Path(name).is_absolute()
        if not inside or ((folder / name).exists() and not is_own(folder / name, folder)):
            raise ModelError(
                f"model.name: {path} places weights in {shown(name)}, outside of the folder; only files of the "
                "model's own folder are read. Copy the weights into it, and correct the index"
            )


def _base_of(path: Path) -> str | None:
    try:
        base = read_json(path).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return brief(base) if isinstance(base, str) else None
