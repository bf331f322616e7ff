"""Sources of text: the bundled text, a local file or folder, or a hub dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

FORMATS = ".txt, .jsonl, .json, .csv and .tsv, each also as .gz, .parquet, and folders of datasets' save_to_disk"
"""What can be read."""

LATER = {"data_files": None, "apply_chat_template": False, "skip_null": False, "mixture": None, "generated": None}
"""Options that are newer than stored results, with their defaults, which are not written: keys of trials stay equal."""


def format_of(path: Path) -> str | None:
    """The format of a text file by its name: txt, jsonl, csv, tsv or parquet; None for others."""
    name = path.name.lower()
    kind = name.removesuffix(".gz").rpartition(".")[2]
    kind = "jsonl" if kind == "json" else kind
    packed = name.endswith(".gz")
    return kind if kind in ("txt", "jsonl", "csv", "tsv") or (kind == "parquet" and not packed) else None


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by ``save_to_disk`` of the package ``datasets``."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def without_defaults(data: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Written options without those of ``later`` that have its values: files and keys of before stay the same."""
    return {key: value for key, value in data.items() if key not in later or value != later[key]}


class TextSource(BaseModel):
    """Exactly one of ``bundled``, ``file`` and ``dataset``.

    A ``.txt`` file is one document. Other files and datasets have one document in each row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    places: ClassVar[tuple[str, ...]] = ("bundled", "file", "dataset")
    """The options that say where the text is; exactly one is given."""

    bundled: str | None = Field(default=None, description="a bundled text, such as reference-calibration")
    file: Path | None = Field(
        default=None,
        description=f"a local file or folder: {FORMATS}. A .txt is one document; .jsonl and .json have one JSON object "
        "per line",
    )
    dataset: str | None = Field(default=None, description="a dataset on the Hugging Face hub")
    subset: str | None = Field(default=None, description="the hub dataset's configuration, such as wikitext-2-raw-v1")
    data_files: str | tuple[str, ...] | None = Field(
        default=None, description="files of the hub dataset, such as en/c4-train.00000-of-01024.json.gz; null: all"
    )
    split: str = Field(default="train", description="the split of the hub dataset, or of the folder")
    field: str | tuple[str, ...] = Field(
        default="text",
        description="the column that holds the text; a list of several, such as [question, answer], is joined by line "
        "breaks. With apply_chat_template the default is messages",
    )
    apply_chat_template: bool = Field(
        default=False,
        description="rows are chats (lists of messages with role and content), which the tokenizer's chat template "
        "turns into text",
    )
    skip_null: bool = Field(default=False, description="leave out rows whose text is null; otherwise they are refused")
    revision: str | None = Field(default=None, description="the hub dataset's revision")
    limit: int | None = Field(default=None, ge=1, description="read at most this many documents")

    @model_validator(mode="after")
    def _one_place(self) -> TextSource:
        self.check_place()
        return self

    def check_place(self) -> None:
        """Raise :class:`ValueError` unless exactly one place is named."""
        given = [key for key in self.places if getattr(self, key) is not None]
        if len(given) != 1:
            known = f"{', '.join(self.places[:-1])} or {self.places[-1]}"
            raise ValueError(f"name one of {known} (found {' and '.join(given) if given else 'none'})")
        if self.data_files is not None and self.dataset is None:
            raise ValueError("data_files are files of a hub dataset; name one with dataset, or leave data_files out")

    @field_validator("field", "data_files", "mixture", check_fields=False)
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("name at least one (found [])")
        return value

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, handler: Any) -> dict[str, Any]:
        return without_defaults(handler(self), LATER)

    @property
    def fields(self) -> tuple[str, ...]:
        """The columns of a row that are its text."""
        if self.apply_chat_template and self.field == "text":
            return ("messages",)
        return (self.field,) if isinstance(self.field, str) else self.field

    @property
    def label(self) -> str:
        """The text's name in reports."""
        if self.bundled:
            name = f"bundled {self.bundled}"
        elif self.file:
            name = self.file.name
        else:
            name = "/".join(part for part in (self.dataset, self.subset, self.split) if part)
        if self.data_files is not None:
            name += f" ({self.data_files if isinstance(self.data_files, str) else ', '.join(self.data_files)})"
        return f"{name} by chat template" if self.apply_chat_template else name
