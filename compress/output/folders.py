"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...registry import SpecError


def write_json(path: Path, data: Any) -> None:
    """Write JSON that every reader accepts: infinity and NaN become their names as strings."""
    path.write_text(json.dumps(plain(data), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def plain(value: Any) -> Any:
    """``value`` as JSON holds it; NaN and infinity become their names, what JSON does not know its text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content, as hexadecimal digits."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total.update(block)
    return total.hexdigest()


@contextmanager
def whole_file(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """The path to write a file to; it appears as ``target`` when the block ends, and not at all if that fails.

    Folders above it are made, and removed again where it fails. Raises :class:`SpecError` before the block where the
    file exists and may not be replaced, or cannot be made.
    """
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        remedy = "replace it with --overwrite" if target.is_file() else "it is not a file"
        raise SpecError(f"{target} exists; choose another with --out, or {remedy}")
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        except OSError as error:
            raise SpecError(f"{target} cannot be written: {error.strerror}; name another place with --out") from None
        yield partial
        os.replace(partial, target)
    except BaseException:
        for left in (partial.unlink, *(folder.rmdir for folder in made)):
            with suppress(OSError):
                left()
        raise


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def disk_is_full(error: BaseException) -> bool:
    """Whether an error means that the disk is full; safetensors reports it in a sentence."""
    if isinstance(error, OSError):
        # numpy reports how much it could write, and no number
        return error.errno in FULL or (error.errno is None and "requested and" in str(error))
    return type(error).__name__ == "SafetensorError" and any(os.strerror(code) in str(error) for code in FULL)


def make_readable(path: Path) -> None:
    """Give a file the permissions of new files: safetensors writes files that only their owner can read."""
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _not_writable(folder: Path) -> str | None:
    """Why nothing can be made in a folder: root may write everywhere, but not in /proc, so it is tried."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".prunekit-", dir=folder))
    except OSError as error:
        return error.strerror or str(error)
    return None


@dataclass
class RunFolder:
    """A results folder, or one of another kind, that is filled under another name and then renamed."""

    target: Path
    overwrite: bool = False
    what: str = "results folder"
    marker: str = "results.json"
    """A file that every folder of this kind has; other folders are never replaced."""
    partial: Path = field(init=False)

    def __post_init__(self) -> None:
        self.target = Path(self.target).expanduser()
        self.target = self.target.parent.resolve() / self.target.name if self.target.name else self.target.resolve()
        self.partial = self.target.with_name(f".{self.target.name}.partial-{os.getpid()}")

    def check(self) -> None:
        """Raise :class:`SpecError` where the folder exists and may not be replaced, or cannot be made."""
        if not os.path.lexists(self.target):
            above = next(folder for folder in self.target.parents if folder.exists())
            why = _not_writable(above)
            if why:
                raise SpecError(
                    f"{self.what} {self.target} cannot be made: {above} is not a folder that can be written to ({why})"
                    "; name another place with --out"
                )
            return
        is_folder = self.target.is_dir() and not self.target.is_symlink()
        if not is_folder or (any(self.target.iterdir()) and not (self.target / self.marker).is_file()):
            why = f"no {self.marker} in it" if is_folder else "not a folder"
            a = "an" if self.what[0] in "aeiou" else "a"
            raise SpecError(
                f"{self.target} exists and is not {a} {self.what} ({why}), so it is not replaced, even with "
                "--overwrite; choose another with --out"
            )
        if not self.overwrite:
            raise SpecError(
                f"{self.what} {self.target} exists; choose another with --out, or replace it with --overwrite"
            )

    @contextmanager
    def open(self) -> Iterator[Path]:
        """The folder to write into; it appears under its name when the block ends, and is deleted if it fails.

        Raises :class:`SpecError` where the disk is full.
        """
        self.check()
        made = [folder for folder in self.target.parents if not folder.exists()]
        try:
            try:
                self.partial.mkdir(parents=True)
            except OSError as error:
                raise SpecError(f"{self.what} {self.target} cannot be made: {error}") from None
            yield self.partial
            self._appear()
        except BaseException as error:
            shutil.rmtree(self.partial, ignore_errors=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            where = getattr(error, "filename", None)
            elsewhere = isinstance(where, str) and not Path(where).absolute().is_relative_to(self.partial)
            if disk_is_full(error) and not elsewhere:
                raise SpecError(
                    f"{self.what} {self.target} cannot be written: {getattr(error, 'strerror', None) or error}; make "
                    "room there, or name another place with --out"
                ) from error
            raise

    def _appear(self) -> None:
        self.check()
        old = self.target.with_name(f"{self.partial.name}-old")
        if self.target.exists():
            os.replace(self.target, old)
        os.replace(self.partial, self.target)
        shutil.rmtree(old, ignore_errors=True)
