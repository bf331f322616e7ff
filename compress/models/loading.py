"""Loads a language model, alone or inside another one, with its tokenizer: from the package, disk or hub."""

from __future__ import annotations

import hashlib
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import ModelError
from ...registry.tensors.devices import place_name, places_of, stored_tensor
from . import device_map, fit, gguf_file, named, origin
from .architectures import PRUNED
from .exported import classes
from .exported.manifest import MANIFEST, check_files, read_manifest
from .given import check_predicts
from .language import auto_class
from .source import ModelSource, place_of


@dataclass
class Loaded:
    """A model in evaluation mode without gradients, its tokenizer and their origin.

    ``identity``: name, requested revision, commit found on the hub, whether the model's own code was run; ``weights``:
    how a GGUF stores them; ``tokenizer``: its name, where another one was asked for.
    """

    model: Any
    tokenizer: Any
    identity: dict[str, Any]


def load(source: ModelSource, check: bool = True) -> Loaded:
    """Load model and tokenizer of ``source``; raises :class:`ModelError`, which names key, value and remedy.

    Every weight of the checkpoint must have its place in the model, and the other way round. Files outside of the
    model's folder are not read, and its configuration cannot ask for other code than transformers' own. With ``check``,
    an exported folder is compared with its manifest first; :class:`DataError` names damaged files.
    """
    device = usable_device(source.device)
    place = place_of(source)
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.revision is not None:
        options["revision"] = source.revision
    if source.gguf is not None and not Path(place).is_file():
        place = _downloaded(place, source)
    file = _gguf(place)
    if file is None:
        _check_origin(source, place, check)
    elif source.name in named.MODELS:
        named.MODELS[source.name].check(file)
    dtype: str = source.dtype
    if dtype == "auto" and (file is not None or (source.name is None and device.type == "cpu")):
        dtype = "float32"
    model, report = _placed(source, place, device, dtype, options)
    fit.check_report(source.label, report)
    if file is not None:
        gguf_file.check_tensors(model, file)
        gguf_file.make_plain(model)
    tokenizer = _tokenizer(source, place, options)
    fit.check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings, source.label)
    model.eval().requires_grad_(False)
    identity = {
        "name": source.label,
        "revision": source.revision,
        "commit": _commit(source),
        "trust_remote_code": source.trust_remote_code,
    }
    weights = gguf_file.facts_of(file).weights if file is not None else _weights_of_base(Path(place))
    identity |= {} if weights is None else {"weights": weights}
    identity |= {} if source.tokenizer is None else {"tokenizer": source.tokenizer}
    return Loaded(model, tokenizer, identity)


def _gguf(place: str) -> Path | None:
    """The GGUF file that a model's place is; None for a folder and for a hub id."""
    return Path(place) if Path(place).is_file() else None


def _downloaded(hub_id: str, source: ModelSource) -> str:
    """The GGUF of a hub model in the hub's cache."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(hub_id, str(source.gguf), revision=source.revision)
    except Exception as error:
        raise ModelError(_loading_failed("GGUF", source, hub_id, error)) from error


def _tokenizer(source: ModelSource, place: str, options: dict[str, Any]) -> Any:
    import transformers

    if source.tokenizer is not None:
        folder = Path(source.tokenizer).expanduser()
        place = str(folder) if folder.is_dir() else source.tokenizer
        options = {"trust_remote_code": source.trust_remote_code}
    elif (file := _gguf(place)) is not None:
        return gguf_file.tokenizer_of(file)
    try:
        return transformers.AutoTokenizer.from_pretrained(place, **options)
    except Exception as error:
        raise ModelError(_loading_failed("tokenizer", source, place, error)) from error


def _weights_of_base(folder: Path) -> str | None:
    """How the weights were stored from which an exported folder was made, if that changed them."""
    if not (folder / MANIFEST).is_file():
        return None
    return getattr(read_manifest(folder).base, "weights", None)


def _commit(source: ModelSource) -> str | None:
    """The commit of a model of the hub, by the cache that it was loaded from; None for a local model."""
    from huggingface_hub import try_to_load_from_cache

    file = source.gguf or "config.json"
    if source.name is None or not source.is_on_hub:
        return None
    found = try_to_load_from_cache(source.name, file, revision=source.revision)
    return Path(found).parents[len(Path(file).parts) - 1].name if isinstance(found, str) else None


def _check_origin(source: ModelSource, place: str, check: bool) -> None:
    """Check what the files of a model ask for, and an exported folder, if ``check``, against its manifest.

    ``place`` is a folder or a hub id. The classes of exported models are registered with transformers. Raises
    :class:`ModelError`, and :class:`DataError` for files that differ from the written ones.
    """
    from transformers import PreTrainedConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(place)
    if check and (folder / MANIFEST).is_file():
        check_files(folder, read_manifest(folder))
    options: dict[str, Any] = {} if source.revision is None else {"revision": source.revision}
    try:
        adapter = find_adapter_config_file(place, **options)
        config, _ = PreTrainedConfig.get_config_dict(place, **options)
    except Exception:  # loading the model reports what is wrong
        return
    if adapter is not None:
        raise origin.adapter_found(source.label)
    origin.check_config(config, source.label, source.attention)
    kind = str(config.get("model_type", ""))
    if kind.startswith(PRUNED):
        try:
            classes.register(kind.removeprefix(PRUNED))
        except ModelError:
            if "auto_map" not in config or (folder / MANIFEST).is_file():
                raise
            return  # a class that prunekit did not write, with code of its own


def _placed(
    source: ModelSource, place: str, device: torch.device, dtype: str, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The model on its device, or spread over devices and disk, and transformers' report on its loading."""
    chosen: dict[str, Any] = {}
    config = _config(source, place, options)
    check_predicts(config)
    if source.attention is not None:
        # Without the configuration's object, an _attn_implementation in config.json would win over the user's choice.
        chosen = {"config": config, "attn_implementation": source.attention}
    file = _gguf(place)
    if file is not None:
        chosen["config"] = config
        options = gguf_file.loading_options()
    spread: dict[str, Any] = {}
    folder = None
    if source.device == "auto":
        limits = dict(source.max_memory or ())
        budgets = device_map.budgets(limits, device.type == "cuda", lambda: _size(source, place, dtype, options))
        folder = device_map.new_folder(source.offload_folder)
        spread = {"device_map": "auto", "max_memory": budgets, "offload_folder": folder}
    try:
        with device_map.quiet_loading(), nullcontext(place) if file is None else gguf_file.alone(file) as where:
            found: Any = auto_class(config).from_pretrained(
                where,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported, and refused by name
                **chosen,
                **spread,
                **options,
            )
        model, report = found
        if not spread:
            model = model.to(device)
        elif set(places_of(model)) == {"disk"}:
            largest = max(weight.numel() * weight.element_size() for weight in model.parameters())
            held = ", ".join(f"{place_name(key)} {size:,} bytes" for key, size in budgets.items())
            raise ModelError(
                f"model.max_memory: no device can hold any part of {source.label} (for weights: {held}; its largest "
                f"weight takes {largest:,} bytes, and a device needs room for a whole layer); allow more, or free some"
            )
        if folder is not None and "disk" in places_of(model):
            weakref.finalize(model, device_map.remove_folder, folder)
            folder = None
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"model.device: {source.label} does not fit on {device}; set model.dtype: bfloat16, or let "
            "model.device: auto with model.max_memory spread it"
        ) from error
    except ModelError:
        raise
    except Exception as error:  # loading checkpoints of any origin can fail with any error
        raise ModelError(_loading_failed("model", source, place, error)) from error
    finally:
        if folder is not None:
            device_map.remove_folder(folder)
    return model, report


def _config(source: ModelSource, place: str, options: dict[str, Any]) -> Any:
    import transformers

    file = _gguf(place)
    if file is not None:
        return gguf_file.config_of(file)
    try:
        return transformers.AutoConfig.from_pretrained(place, **options)
    except Exception as error:
        raise ModelError(_loading_failed("model", source, place, error)) from error


def _size(source: ModelSource, place: str, dtype: str, options: dict[str, Any]) -> int:
    """Bytes of the model, computed from its configuration."""
    kind = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    return _empty(source, place, _config(source, place, options), **kind).get_memory_footprint()


def _empty(source: ModelSource, place: str, config: Any, **kind: Any) -> Any:
    """The model without values."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=source.trust_remote_code, **kind)
    except Exception as error:
        raise ModelError(_loading_failed("model", source, place, error)) from error


def outline_of(source: ModelSource) -> nn.Module | None:
    """The model without values, by its configuration alone; None where that is not known without a download.

    Raises :class:`ModelError` for a configuration of which no model can be made.
    """
    try:
        place = place_of(source)
    except ModelError:
        return None  # loading says what is wrong
    if source.gguf is not None and not Path(place).is_file():
        return None
    if _gguf(place) is None:
        _check_origin(source, place, check=False)
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.revision is not None:
        options["revision"] = source.revision
    return _empty(source, place, _config(source, place, options))


def fingerprint(model: nn.Module) -> str:
    """sha256 over the state dict in name order: name, dtype, shape and bytes of every tensor, one at a time.

    Offloaded tensors are read from their store. Raises :class:`ModelError` for a tensor without values.
    """
    total = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(state):
        tensor = state[name]
        if not isinstance(tensor, Tensor):
            continue
        values = stored_tensor(model, name) if tensor.device.type == "meta" else tensor
        if values is None:
            raise ModelError(f"{name} has no values, so the model has no fingerprint; load it with from_pretrained")
        total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        # In logical order for any storage; torch casts to bytes, because numpy has no bfloat16.
        total.update(values.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def usable_device(name: str) -> torch.device:
    """The device of that name; raises :class:`ModelError` if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelError(f"model.device: {name!r} is not a device; use auto, cpu, cuda or cuda:0") from None
    if device.type == "meta":
        raise ModelError("model.device: meta holds no weights, so nothing runs on it; use auto, cpu or cuda")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ModelError(
                f"model.device: {name} was asked for, but torch {torch.__version__} sees {count or 'no'} CUDA "
                f"device{'s' if count > 1 else ''}; set model.device: auto, or check torch's CUDA build and the driver"
            )
        return device
    try:
        torch.empty(1, device=device).cpu()
    except Exception as error:  # each kind of device raises its own error if it is missing
        reason = reason_of(error).split(". ")[0]
        raise ModelError(
            f"model.device: torch {torch.__version__} cannot use {name} here ({reason}); set model.device: auto"
        ) from None
    return device


def reason_of(error: Exception) -> str:
    """An error's class and first line; the class alone if that line is the heading of a list."""
    lines = str(error).strip().splitlines()
    brief = bool(lines) and not lines[0].rstrip().endswith(":")
    return f"{type(error).__name__}: {lines[0][:300]}" if brief else type(error).__name__


def _loading_failed(what: str, source: ModelSource, place: str, error: Exception) -> str:
    from huggingface_hub import constants

    reason = reason_of(error)
    if "trust_remote_code" in str(error) and not source.trust_remote_code:
        return (
            f"model.trust_remote_code: the {what} of {source.label} needs Python code that comes with it; read that "
            "code, then set trust_remote_code: true to run it"
        )
    if isinstance(error, ImportError):
        return f"model.name: the {what} of {source.label} cannot be loaded ({reason}); install the package it names"
    if Path(place).is_dir():
        remedy = "name a folder that save_pretrained wrote, tokenizer included"
    elif constants.HF_HUB_OFFLINE:
        remedy = (
            "it is neither a folder here nor in the cache, and the hub is switched off (HF_HUB_OFFLINE): download it "
            "first, unset the variable, or name a local folder"
        )
    else:
        remedy = "check hub id, revision, network and, for a gated model, your access; or name a local folder"
    return f"model.name: the {what} of {source.label} cannot be loaded ({reason}); {remedy}"
