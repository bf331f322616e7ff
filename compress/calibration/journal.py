"""Measured numbers in a file that grows line by line, so that a run that was killed loses none."""

from __future__ import annotations

import hashlib
import json
from collections import UserDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ...registry import DataError


class Journal(UserDict[str, float]):
    """Numbers by what they are of; each is appended to the file ``path`` as soon as it is measured.

    ``origin`` is what the numbers depend on apart from that: model and text. Lines of another origin are left alone,
    and so is a line that is damaged because a run was killed while it was written. ``known`` are numbers that need no
    line. Raises :class:`DataError` for a file that cannot be read or written.
    """

    def __init__(self, path: Path, origin: Mapping[str, str], known: Mapping[str, float] | None = None):
        super().__init__()
        self._path = path
        self._origin = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()
        self.data.update(known or {})
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        except OSError as error:
            raise DataError(f"{path}: measured numbers cannot be read: {error}; delete the file") from error
        for line in lines:
            with suppress(ValueError, TypeError):
                origin_, key, number = json.loads(line)
                if origin_ == self._origin:
                    self.data[str(key)] = float(number)

    def __setitem__(self, key: str, number: float) -> None:
        self.data[key] = number
        try:
            with self._path.open("a", encoding="utf-8") as file:  # a new line ends one that was never finished
                file.write(f"\n{json.dumps([self._origin, key, number])}\n")
        except OSError as error:
            raise DataError(f"{self._path}: measured numbers cannot be written: {error}; make room there") from error
