"""Memory limits of the devices for a model that is placed automatically, and the folder for its offloaded rest."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from ...registry import ModelError

SHARE = 0.9
"""Default share of a device's free memory for weights; batches and statistics need the rest."""

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

EXAMPLE = '{"0": 20GiB, cpu: 30GiB}'


def _read(raw: Any) -> Any:
    """Pairs of device and size from a mapping; names are checked here, the existence of the devices when loading."""
    if raw is None:
        return None
    if not isinstance(raw, (Mapping, tuple)):
        raise ValueError(f"expected a mapping of devices and sizes, such as {EXAMPLE} (found {raw!r})")
    pairs = []
    for device, size in raw.items() if isinstance(raw, Mapping) else raw:
        name = str(device).removeprefix("cuda:")
        if name == "disk":
            raise ValueError("disk holds what does not fit elsewhere, so it has no size; leave it out")
        if name != "cpu" and not name.isdecimal():
            raise ValueError(f'{device!r} is not a device; name cpu or the number of an accelerator, such as "0"')
        try:
            bytes_of(size)
        except ValueError as error:
            raise ValueError(f"{device}: {error}") from None
        pairs.append((name, str(size)))
    twice = {name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}
    if not pairs or twice:
        problem = f"device {min(twice)} is named twice" if twice else "is empty"
        raise ValueError(f"{problem}; write one size for each device, such as {EXAMPLE}")
    return tuple(pairs)


MaxMemory = Annotated[
    tuple[tuple[str, str], ...] | None,
    BeforeValidator(_read),
    WithJsonSchema(
        {"anyOf": [{"type": "object", "additionalProperties": {"type": ["string", "integer"]}}, {"type": "null"}]}
    ),
]
"""Device and size as (("cpu", "4GiB"), ...), which can be hashed; a mapping in files."""


def bytes_of(size: Any) -> int:
    """Bytes in a size such as 20GiB, 1.5 GB or 1000; raises :class:`ValueError` for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|)", str(size).strip())
    if found is None:
        raise ValueError(f"{size!r} is not a size; write one such as 20GiB or 500MB, or a number of bytes")
    return int(float(found[1]) * UNITS[found[2]])


def budgets(limits: Mapping[str, str], accelerators: bool, size: Callable[[], int]) -> dict[int | str, int]:
    """Bytes for weights on each device: from ``limits``, otherwise :data:`SHARE` of the free memory.

    If one of several accelerators can hold a model of ``size()`` bytes, the others are not used.
    Raises :class:`ModelError` for a device in ``limits`` that this machine does not have.
    """
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    found: dict[int | str, int] = {key: int(SHARE * free[key]) for key in free if accelerators and isinstance(key, int)}
    found["cpu"] = int(SHARE * free.get("cpu", max(free.values(), default=0)))
    here = {str(key): key for key in found}
    for name, limit in limits.items():
        if name not in here:
            raise ModelError(
                f"model.max_memory: device {name} is not here; there are {', '.join(here)}. Leave {name} out, or check "
                "torch's CUDA build and the driver"
            )
        found[here[name]] = bytes_of(limit)
    numbers = [key for key in found if isinstance(key, int)]
    if len(numbers) > 1:
        needed = size()
        enough = next((key for key in numbers if needed <= found[key]), None)
        if enough is not None:
            return {enough: found[enough], "cpu": found["cpu"]}
    return found


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Suppress two warnings: accelerate's about offloaded weights, transformers' about weights that do not fit.

    Offloading is intended, and results report the places. Weights that do not fit are an error with its own message.
    """
    loggers = [logging.getLogger("accelerate.big_modeling"), logging.getLogger("transformers.modeling_utils")]

    def other(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not message.startswith("Some parameters are on the meta device") and "LOAD REPORT" not in message

    for logger in loggers:
        logger.addFilter(other)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(other)


def new_folder(parent: str | None) -> str | None:
    """A new folder for offloaded weights, in ``parent`` or among temporary files.

    None if temporary files have no place; most models need none, because their weights are read from the checkpoint.
    Raises :class:`ModelError` if ``parent`` cannot be used.
    """
    try:
        if parent is not None:
            parent = str(Path(parent).expanduser())
            Path(parent).mkdir(parents=True, exist_ok=True)
        return tempfile.mkdtemp(prefix="prunekit-offload-", dir=parent)
    except OSError as error:
        if parent is None:
            return None
        raise ModelError(
            f"model.offload_folder: no folder can be made in {parent} ({error}); name one on a disk with room for the "
            "weights"
        ) from None


def remove_folder(folder: str) -> None:
    """Remove a folder of :func:`new_folder` with its content."""
    shutil.rmtree(folder, ignore_errors=True)
