"""Reads documents of text: bundled, from local files and folders, or from datasets of the Hugging Face hub."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ...registry import DataError, TextSource, near
from ...registry.text import FORMATS, format_of, is_saved_dataset
from ..bundled import TEXTS
from ..models.loading import reason_of
from ..output.reading import parse_json

Row = tuple[str, Any]
"""Where a row is, for messages, and the row: a text, or a mapping of columns."""


def read_documents(source: TextSource, tokenizer: Any = None) -> list[str]:
    """The documents of a source, in its order, at most ``source.limit``.

    ``tokenizer`` has the chat template of a source with ``apply_chat_template``. Raises :class:`DataError` naming place
    and remedy: no such file or dataset, a row without text, no text at all.
    """
    if source.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{source.label}: apply_chat_template needs a chat template, and this model's tokenizer has none; use an "
            "instruction-tuned model, or name a text column with field"
        )
    texts = (_text(row, source, tokenizer, place) for place, row in _rows(source))
    found = list(islice((text for text in texts if text is not None), source.limit))
    if not any(text.strip() for text in found):
        raise DataError(f"{source.label} holds no text; name a source that does")
    return found


def _rows(source: TextSource) -> Iterator[Row]:
    if source.dataset is not None:
        return _dataset(source)
    if source.file is not None:
        return _file(source.file.expanduser(), source)
    if source.bundled in TEXTS:
        return _file(TEXTS[source.bundled], source)
    raise DataError(
        f"no bundled text is called {source.bundled!r}{near(str(source.bundled), TEXTS)}; "
        f"there are {', '.join(sorted(TEXTS))}"
    )


def _file(path: Path, source: TextSource) -> Iterator[Row]:
    place = f"text file {path}"
    if is_saved_dataset(path):
        yield from _saved(path, source)
        return
    if not path.is_file():
        other = "is not a regular file" if path.exists() else "does not exist"
        what = "is a folder, but not one of save_to_disk" if path.is_dir() else other
        raise DataError(f"{place} {what}; name a file ({FORMATS})")
    kind = format_of(path)
    if kind is None:
        raise DataError(f"{place}: files of this ending are not read ({FORMATS} are); unpack it, or convert it")
    try:
        if kind == "parquet":
            yield from _parquet(path, place)
        elif kind in ("csv", "tsv"):
            yield from _table(path, "," if kind == "csv" else "\t", place)
        else:
            with _opened(path) as stream:
                if kind == "txt":
                    yield place, stream.read()
                else:
                    yield from _lines(stream, place)
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at {error.start}: {error.reason}"
        raise DataError(
            f"{place} is not UTF-8 ({found}); if it is text, convert it (iconv -f latin1 -t utf-8), else name a text "
            "file"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{place} cannot be read: {reason}; check its permissions and that it is whole") from None


def _opened(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _lines(stream: Iterable[str], file: str) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{place} cannot be read as JSON ({error}); write one object per line") from None
        if not isinstance(record, dict):
            raise DataError(f"{place} is not a JSON object; write one object per line, with the text as a field")
        yield place, record


def _table(path: Path, separator: str, place: str) -> Iterator[Row]:
    """Rows of a file with a line of column names."""
    import pandas

    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig", "sep": separator}
    number = 0
    try:
        with pandas.read_csv(path, chunksize=1024, **options) as chunks:
            for chunk in chunks:
                for record in chunk.to_dict("records"):
                    number += 1
                    # A cell that a short row lacks is read as a float.
                    cells = {key: value if isinstance(value, str) else None for key, value in record.items()}
                    yield f"{place}, row {number}", cells
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise DataError(
            f"{place}, after row {number}: {reason_of(error)}; write a line of column names, and one row "
            "for each document"
        ) from None


def _parquet(path: Path, place: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for record in batch.to_pylist():
                number += 1
                yield f"{place}, row {number}", record
    except pyarrow.ArrowException as error:
        raise DataError(f"{place} is not Parquet, or is damaged ({reason_of(error)}); write it again") from None


def _saved(path: Path, source: TextSource) -> Iterator[Row]:
    """Rows of a folder that ``save_to_disk`` of a dataset, or of a dictionary of splits, wrote."""
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the folder can be damaged in many ways
        raise DataError(f"folder {path} cannot be read: {reason_of(error)}; write it again with save_to_disk") from None
    if isinstance(found, datasets.DatasetDict):
        if source.split not in found:
            raise DataError(f"folder {path} has no split {source.split!r}; set split to one of: {', '.join(found)}")
        found = found[source.split]
    for number, record in enumerate(found):
        yield f"folder {path}, row {number}", record


def _dataset(source: TextSource) -> Iterator[Row]:
    """Rows of a hub dataset; with a limit it is streamed, so that a large one is not downloaded whole."""
    import datasets

    place = f"dataset {source.dataset}" + (f" ({source.subset})" if source.subset else "") + f", split {source.split}"
    options: dict[str, Any] = {}
    if source.data_files is not None:
        options["data_files"] = source.data_files if isinstance(source.data_files, str) else list(source.data_files)
    try:
        rows = iter(
            datasets.load_dataset(
                source.dataset,
                source.subset,
                split=source.split,
                revision=source.revision,
                streaming=source.limit is not None,
                **options,
            )
        )
        first = next(rows, None)
    except Exception as error:  # the loader fails in many ways, and each is about the name, the split or the network
        offline = datasets.config.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE
        remedy = (
            "the hub is switched off (HF_HUB_OFFLINE): download it first, unset the variable, or name a local file"
            if offline
            else "check dataset, subset, data_files, split and revision, and the network; or name a local file"
        )
        raise DataError(f"{place} cannot be read: {reason_of(error)}; {remedy}") from error
    number = 0
    while first is not None:
        yield f"{place}, row {number}", first
        number += 1
        try:
            first = next(rows, None)
        except Exception as error:
            raise DataError(f"{place}, row {number} cannot be read: {reason_of(error)}; check the network") from error


def _text(row: Any, source: TextSource, tokenizer: Any, place: str) -> str | None:
    """The text of a row; None for one without text that is to be left out."""
    read = [row] if isinstance(row, str) else [_field(row, field, source, tokenizer, place) for field in source.fields]
    parts = [part for part in read if part is not None]
    if len(parts) < len(read):
        return None
    return "\n".join(parts)


def _field(record: Mapping[str, Any], field: str, source: TextSource, tokenizer: Any, place: str) -> str | None:
    if field not in record:
        there = ", ".join(sorted(map(str, record))) or "none"
        more = ". A chat's messages need apply_chat_template: true" if "messages" in record else ""
        raise DataError(f"{place} has no field {field!r}{near(field, record)}; set field to one of: {there}{more}")
    value = record[field]
    if value is None:
        if source.skip_null:
            return None
        raise DataError(
            f"{place}: field {field!r} is null, so this row has no text; set skip_null: true to leave such rows out"
        )
    if source.apply_chat_template:
        return _chat(value, field, tokenizer, place)
    if not isinstance(value, str):
        chat = isinstance(value, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
        remedy = (
            "set apply_chat_template: true, which makes text of a chat's messages"
            if chat
            else "set field to one that holds text"
        )
        raise DataError(f"{place}: field {field!r} holds {type(value).__name__}, not text; {remedy}")
    return value


def _chat(messages: Any, field: str, tokenizer: Any, place: str) -> str:
    """The messages of a chat as the tokenizer's template writes them."""
    if not (isinstance(messages, list) and messages and all(isinstance(turn, Mapping) for turn in messages)):
        raise DataError(
            f"{place}: field {field!r} holds {type(messages).__name__}, not the messages of a chat (a list of role and "
            "content); set field to the one that does, or leave apply_chat_template out"
        )
    return chat_text(messages, tokenizer, place)


def chat_text(messages: Any, tokenizer: Any, place: str, ask: bool = False) -> str:
    """The messages of a chat as the tokenizer's template writes them; ``ask`` adds the beginning of an answer.

    Raises :class:`DataError` with the place for messages that the template refuses.
    """
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{place}: the tokenizer's chat template refuses these messages ({reason_of(error)}); write role (user, "
            "assistant, system) and content as the model expects them"
        ) from None
