"""Reads files that others may have made: regular files only, within bounds; text and JSON."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LARGEST = 2**63 - 1
"""The largest integer that an option may have."""

MOST_BYTES = 1 << 26

MOST_VALUES = 2_000_000

DEEPEST = 64

LONGEST_NAME = 255
"""Bytes of a file's or folder's name."""

BRIEF = 120
"""Characters of a value within a message."""


def brief(value: object, most: int = BRIEF) -> str:
    """A value's text, at most ``most`` characters, cut in its middle."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[-(most // 4) :]}"


def shown(value: object) -> str:
    """A value as Python writes it, cut as :func:`brief` does."""
    try:
        return brief(repr(value))
    except ValueError:  # Python writes no integer of more digits
        return "a number of thousands of digits"


@contextmanager
def opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A regular file, open for reading; raises ``OSError``, or ``ValueError`` for pipes, devices and sockets."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield file


def check_regular(path: Path) -> None:
    """Raise ``ValueError`` for a pipe, a device or a socket, which would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file; raises ``OSError``, or ``ValueError`` with the reason."""
    with opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (see byte {error.start}); save it as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """The data of a JSON file; raises as :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """The data of a JSON text; raises ``ValueError`` with the reason, also for what is too large or too deep."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} characters")
    try:
        data = json.loads(text, parse_int=_integer, parse_constant=_refused)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    level, depth, count = [data], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if count > MOST_VALUES:
            raise ValueError(f"it holds more than {MOST_VALUES:,} values")
        level = [item for each in level if isinstance(each, (dict, list)) for item in _items(each)]
    if re.search(r"\\u[dD][89a-fA-F]", text) and re.search(r"[\ud800-\udfff]", json.dumps(data, ensure_ascii=False)):
        raise ValueError("it holds half of a surrogate pair")
    return data


def _items(value: dict[str, Any] | list[Any]) -> Any:
    return value.values() if isinstance(value, dict) else value


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > 300:
        raise ValueError(f"a number of {len(digits):,} digits is larger than can be computed with")
    return int(digits)


def path_problem(path: str | Path) -> str | None:
    """Why no file system takes a path; ``None`` where one can."""
    text = os.fspath(path)
    if "\0" in text:
        return "a path has no NUL byte"
    try:
        names = os.fsencode(text).split(os.sep.encode())
    except UnicodeEncodeError:
        return "a path has no half of a surrogate pair"
    if any(len(name) > LONGEST_NAME for name in names) or sum(map(len, names)) > 4000:
        return f"the name is too long; a file's name has at most {LONGEST_NAME} bytes"
    if text.startswith("~"):
        try:
            Path(text).expanduser()
        except RuntimeError:
            return f"there is no home folder {names[0].decode()}"
    return None
