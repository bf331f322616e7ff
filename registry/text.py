"""Sources of text: the bundled text, a local file, or a hub dataset."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TextSource(BaseModel):
    """Exactly one of ``bundled``, ``file`` and ``dataset``.

    Local ``.txt`` files are one document, ``.jsonl`` files one per line (``field``), hub datasets one per row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundled: str | None = Field(default=None, description="a bundled text, such as reference-calibration")
    file: Path | None = Field(default=None, description="a local .txt or .jsonl file")
    dataset: str | None = Field(default=None, description="a dataset on the Hugging Face hub")
    subset: str | None = Field(default=None, description="the hub dataset's configuration, such as wikitext-2-raw-v1")
    split: str = Field(default="train", description="the hub dataset's split")
    field: str = Field(default="text", description="the column (hub dataset, .jsonl) that holds the text")
    revision: str | None = Field(default=None, description="the hub dataset's revision")
    limit: int | None = Field(default=None, ge=1, description="read at most this many documents")

    @model_validator(mode="after")
    def _one_place(self) -> TextSource:
        given = [key for key in ("bundled", "file", "dataset") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"name one of bundled, file or dataset (found {' and '.join(given) if given else 'none'})")
        return self

    @property
    def label(self) -> str:
        """The text's name in reports."""
        if self.bundled:
            return f"bundled {self.bundled}"
        if self.file:
            return self.file.name
        return "/".join(part for part in (self.dataset, self.subset, self.split) if part)
