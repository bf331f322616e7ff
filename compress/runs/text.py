"""Reads text from wherever a source says, and cuts calibration batches from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...registry import DataError, TextSource, near
from ...registry.tensors.windows import cut_windows, digest, token_stream, with_bos
from ..bundled import TEXTS
from ..models.loading import reason_of
from ..output.reading import parse_json


def read_documents(source: TextSource) -> list[str]:
    """The documents of a source, in its order, at most ``source.limit``.

    Raises :class:`DataError` naming place and remedy: no such file or dataset, a line without the
    field, no text at all.
    """
    if source.bundled is not None:
        if source.bundled not in TEXTS:
            raise DataError(
                f"no bundled text is called {source.bundled!r}{near(source.bundled, TEXTS)}; "
                f"there are {', '.join(sorted(TEXTS))}"
            )
        documents: Iterable[str] = _file(TEXTS[source.bundled], source)
    elif source.file is not None:
        documents = _file(source.file.expanduser(), source)
    else:
        documents = _dataset(source)
    found = list(islice(documents, source.limit))
    if not any(document.strip() for document in found):
        raise DataError(f"{source.label} holds no text; name a source that does")
    return found


def _file(path: Path, source: TextSource) -> Iterator[str]:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"text file {path} {what}; name a .txt or .jsonl file")
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"text file {path}: only .txt (one document) and .jsonl (one per line) are read; convert it")
    try:
        with path.open(encoding="utf-8-sig") as stream:
            if path.suffix == ".txt":
                yield stream.read()
            else:
                yield from _lines(stream, path, source.field)
    except UnicodeDecodeError as error:
        raise DataError(f"text file {path} is not UTF-8 ({error.reason}); convert it") from None
    except OSError as error:
        raise DataError(f"text file {path} cannot be read: {error.strerror}; check its permissions") from None


def _lines(stream: Iterable[str], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        place = f"text file {path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON ({error}); write one object per line") from None
        if not isinstance(record, dict):
            raise DataError(f"{place} is not a JSON object; write one object per line with the field {field!r}")
        yield _field(record, field, place)


def _dataset(source: TextSource) -> Iterator[str]:
    """Rows of a hub dataset; with a limit it is streamed, so that a large one is not downloaded whole."""
    import datasets

    place = f"dataset {source.dataset}" + (f" ({source.subset})" if source.subset else "") + f", split {source.split}"
    try:
        rows = iter(
            datasets.load_dataset(
                source.dataset,
                source.subset,
                split=source.split,
                revision=source.revision,
                streaming=source.limit is not None,
            )
        )
        first = next(rows, None)
    except Exception as error:  # the loader fails in many ways, and each is about the name, the split or the network
        offline = datasets.config.HF_HUB_OFFLINE or datasets.config.HF_DATASETS_OFFLINE
        remedy = (
            "the hub is switched off (HF_HUB_OFFLINE): download it first, unset the variable, or name a local file"
            if offline
            else "check dataset, subset, split and revision, and the network; or name a local file"
        )
        raise DataError(f"{place} cannot be read: {reason_of(error)}; {remedy}") from error
    number = 0
    while first is not None:
        yield _field(first, source.field, f"{place}, row {number}")
        number += 1
        try:
            first = next(rows, None)
        except Exception as error:
            raise DataError(f"{place}, row {number} cannot be read: {reason_of(error)}; check the network") from error


def _field(record: Mapping[str, Any], field: str, place: str) -> str:
    if field not in record:
        there = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f"{place} has no field {field!r}{near(field, record)}; set field to one of: {there}")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise DataError(f"{place}: field {field!r} holds {kind}, not text; set field to one that holds text")
    return record[field]


def calibration_batches(
    documents: Sequence[str],
    tokenizer: Any,
    sequences: int,
    length: int,
    batch_size: int,
    seed: int,
    label: str = "the calibration text",
) -> list[dict[str, Tensor]]:
    """Batches of ``input_ids`` and ``attention_mask`` (b, length), int64: sequences drawn without replacement.

    The documents are joined to one stream of tokens (one BOS first, where the tokenizer has one) and
    cut in sequences without overlap; ``sequences`` of them are drawn, in an order shuffled by ``seed``.
    The last batch may be smaller. Raises :class:`DataError` where the text has too few.
    """
    stream = with_bos(token_stream(documents, tokenizer), tokenizer)
    pieces = [window.ids for window in cut_windows(stream, length, tail="drop")]
    if len(pieces) < sequences:
        raise DataError(
            f"{label} gives {len(pieces)} sequences of {length} tokens ({len(stream)} tokens in all), but calibration "
            f"asks for {sequences}; lower calibration.sequences to {len(pieces)} or less, shorten calibration.length, "
            "or name a longer text"
            if pieces
            else f"{label} has {len(stream)} tokens, less than one sequence of {length}; shorten calibration.length "
            "or name a longer text"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:sequences].tolist()
    batches = []
    for start in range(0, sequences, batch_size):
        ids = torch.stack([pieces[index] for index in order[start : start + batch_size]])
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches


def fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """sha256 over the ids of all batches, their shapes and their order."""
    return digest(batch["input_ids"] for batch in batches)
