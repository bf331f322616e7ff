"""Which model is meant, and how it is to be loaded: the section ``model`` of a pipeline file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

from ...registry import ModelError
from ..bundled import MODEL
from . import device_map, gguf_file, named, origin
from .device_map import MaxMemory
from .exported.manifest import MANIFEST


class ModelSource(BaseModel):
    """Which model to load, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(
        default=None,
        description=f"hub id, local folder or {' or '.join(named.MODELS)} (prunekit fetch); null or bundled: the "
        "bundled model",
    )
    gguf: str | None = Field(
        default=None, description="a GGUF file in the folder or on the hub, which transformers dequantises"
    )
    tokenizer: str | None = Field(
        default=None, description="hub id or local folder of another tokenizer; null: the model's own"
    )
    revision: str | None = Field(default=None, description="the hub model's revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: the checkpoint's own (of a GGUF, and of the bundled model on a CPU: float32)",
    )
    device: str = Field(
        default="auto",
        description="auto (one CUDA device if the model fits on it, else all of them, else the CPU; what does not fit "
        "is offloaded to memory and disk), cpu, cuda, cuda:1, ...",
    )
    max_memory: MaxMemory = Field(
        default=None,
        description="with device: auto, the most that weights may take on a device, such as "
        f"{device_map.EXAMPLE}; by default 90% of what is free",
    )
    offload_folder: str | None = Field(
        default=None,
        description="with device: auto, where weights go that fit nowhere else and cannot be read from the checkpoint; "
        "null: where temporary files go; removed with the model",
    )
    attention: Literal["sdpa", "eager"] | None = Field(
        default=None, description="attention kernel; null: transformers' choice"
    )
    trust_remote_code: bool = Field(default=False, description="run Python code that comes with the model")

    @field_validator("name")
    @classmethod
    def _bundled(cls, name: str | None) -> str | None:
        return None if name == named.BUNDLED else name

    @model_validator(mode="after")
    def _gguf_is_somewhere(self) -> ModelSource:
        if self.gguf is not None and (self.name is None or self.name in named.MODELS):
            raise ValueError(
                f"gguf is a file of a folder or of the hub, but name is {self.label} (found {self.gguf}); set name to "
                "the folder that holds the file, or to its hub id"
            )
        return self

    @model_validator(mode="after")
    def _spreads_only_by_itself(self) -> ModelSource:
        for key in ("max_memory", "offload_folder"):
            if self.device != "auto" and getattr(self, key) is not None:
                raise ValueError(
                    f"{key} is for models that are placed automatically, but device is {self.device}; set device: "
                    f"auto, or leave {key} out"
                )
        return self

    @model_serializer(mode="wrap")
    def _limits_as_mapping(self, handler: Any) -> dict[str, Any]:
        data = handler(self)
        if data.get("max_memory") is not None:
            data["max_memory"] = dict(data["max_memory"])
        return data

    @property
    def label(self) -> str:
        """The model's name in reports."""
        return "/".join(part for part in (self.name or "bundled", self.gguf) if part)

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is a hub id."""
        return self.name is not None and self.name not in named.MODELS and not Path(self.name).expanduser().exists()


def source_data(place: str) -> dict[str, str]:
    """The section ``model`` of a pipeline file for a name, a hub id, a folder or a GGUF file."""
    path = Path(place).expanduser()
    is_gguf = path.suffix == gguf_file.ENDING and path.is_file()
    return {"name": str(path.parent), "gguf": path.name} if is_gguf else {"name": place}


def place_of(source: ModelSource) -> str:
    """The folder, GGUF file or hub id of a model, checked first because transformers' own messages are unclear."""
    if source.tokenizer is not None and _looks_like_path(source.tokenizer):
        folder = Path(source.tokenizer).expanduser()
        if not folder.is_dir():
            raise ModelError(f"model.tokenizer: folder {source.tokenizer} does not exist; name one, or a hub id")
        origin.check_folder(folder)
    if source.name in named.MODELS:
        return str(named.MODELS[source.name].here())
    if source.name is None:
        folder = MODEL
    else:
        folder = Path(source.name).expanduser()
        if not folder.exists():
            if _looks_like_path(source.name):
                raise ModelError(
                    f"model.name: folder {source.name} does not exist; name a folder with config.json and weights, "
                    "or a hub id such as facebook/opt-125m"
                )
            return source.name
    if not folder.is_dir():
        if source.name is None:
            raise ModelError(f"the bundled model is missing from {folder}; install prunekit again, or set model.name")
        if folder.suffix == gguf_file.ENDING:
            remedy = f"write model: {{name: {folder.parent}, gguf: {folder.name}}}"
        else:
            remedy = "name the folder that holds it and config.json"
        raise ModelError(f"model.name: {source.name} is a file; {remedy}")
    if source.gguf is not None:
        return str(gguf_file.find(folder, source.gguf))
    if not (folder / "config.json").is_file():
        if (folder / MANIFEST).is_file():
            raise ModelError(
                f"model.name: {folder} is an export that holds no model of transformers (profile gguf or dynamic); "
                "name the model that was pruned, or export with --profile hf-hetero"
            )
        origin.refuse_adapter(folder)
        files = sorted(path.name for path in folder.glob(f"*{gguf_file.ENDING}"))
        raise ModelError(
            f"model.name: folder {folder} has no config.json; "
            + (
                f"set model.gguf: {files[0]} to read the GGUF in it"
                if files
                else "name a folder written by save_pretrained, or a hub id"
            )
        )
    origin.check_folder(folder)
    return str(folder)


def _looks_like_path(name: str) -> bool:
    """Whether a name is a path: anything but a hub id, which is NAME or OWNER/NAME."""
    weights = (".safetensors", ".bin", ".gguf", ".pt", ".pth")
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(("/", *weights))
