"""Calibration statistics in a file: gathered once, read by every later run on the same model and text.

A safetensors file: for every site and statistic the table (T, C), the rows (T,) and the mean (C,) in float32, what
scorers have fitted, and in its metadata what they were gathered from, and the numbers that allocators have measured.
Covariances are not in it: they are many times larger.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...registry import ChannelHistory, DataError, GroupPart, Statistic
from ..engine.engine import Engine
from ..engine.site_cut import SiteCut
from ..output.folders import make_readable
from ..output.reading import check_regular
from .fitting import Fits
from .journal import Journal
from .origin import origin_of
from .passes import Batch, Progress, calibrate
from .shared import SomeMoments, wanted

FORMAT = "prunekit statistics 1"

PARTS = ("table", "rows", "mean")

MEASURED = "losses"
"""Key of the measured numbers in the metadata; files of earlier versions have losses alone."""

FITTED = "fits"
"""Key of what scorers have fitted in the metadata: the number of tensors, by what they are of."""

MODULES = {Statistic.__module__: "prunekit.registry.statistics"}
"""By module: its name in files, where it has moved since version 0.1."""

ORIGINS = {
    "model": "another model, or the same one with other weights or another dtype",
    "configuration": "another configuration of this model, such as its rotary embeddings, activations or heads",
    "text": "other calibration text: other documents, seed, number or length of sequences, or padding",
}
"""What a file must have been gathered from, and what a difference means."""


@dataclass
class StatisticsFile:
    """Statistics that are read from ``path``, or gathered and written there; what is missing is added.

    Raises :class:`DataError`, and changes nothing, for a file of something else: another model, text or padding,
    another format, or no statistics at all.
    """

    path: Path
    used: str | None = field(default=None, init=False)
    """"read" or "written" once a strategy has been calibrated; None before."""
    _origin: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def calibrate(self, engine: Engine, batches: list[Batch], progress: Progress) -> None:
        """Give every site its history."""
        origin = self._origin = origin_of(engine.model, batches)
        known = self._read(origin, engine.cuts) if self.path.exists() else {}
        if all(cut in known for cut in engine.cuts):
            for cut, history in known.items():
                cut.state.replace_history(history)
            self.used = "read"
        else:
            check_place(self.path)
            calibrate(engine, batches, progress, every_mean=True)
            with self._locked():
                self._write(origin, engine.cuts)
            self.used = "written"
        for cut in engine.cuts:
            cut.state.replace_history(wanted(cut, cut.history))

    def moments(self, batches: list[Batch]) -> SomeMoments:
        """None are kept."""
        return SomeMoments(0)

    def gradients(self, batches: list[Batch]) -> dict[str, tuple[GroupPart, ...]]:
        """None are kept."""
        return {}

    @contextmanager
    def measured(self, engine: Engine, batches: list[Batch]) -> Iterator[Journal]:
        """The numbers that allocators have measured, by what they are of; new ones are written, after an error too.

        Until then each is in a journal next to the file, which a run that was killed leaves there.
        """
        stored: dict[str, float] = {}
        origin = self._origin = self._origin or origin_of(engine.model, batches)
        if self.path.exists():
            with opened(self.path) as (_, metadata):
                self._check_origin(metadata, origin)
                stored = self._measured(metadata)
        else:
            check_place(self.path)
        journal = self.path.with_name(f".{self.path.name}.measured")
        known = Journal(journal, origin, stored)
        try:
            yield known
        finally:
            if len(known) > len(stored):
                with self._locked():
                    self._write(origin, [], known)
                    journal.unlink(missing_ok=True)
            self.used = self.used or ("written" if len(known) > len(stored) else "read")

    @contextmanager
    def fits(self, engine: Engine, batches: list[Batch]) -> Iterator[Fits]:
        """What scorers have fitted, by what it is of; what is new is written."""
        origin = self._origin = self._origin or origin_of(engine.model, batches)
        stored: Fits = {}
        if self.path.exists():
            with opened(self.path) as (file, metadata):
                self._check_origin(metadata, origin)
                stored = self._fitted(file, metadata)
        else:
            check_place(self.path)
        known = dict(stored)
        yield known
        if len(known) > len(stored):
            with self._locked():
                self._write(origin, [], fits=known)
        self.used = "written" if len(known) > len(stored) else self.used or "read"

    def _fitted(self, file: Any, metadata: dict[str, str]) -> dict[str, tuple[Tensor, ...]]:
        try:
            known = json.loads(metadata.get(FITTED, "{}"))
            return {key: tuple(map(file.get_tensor, _fit_names(key, int(number)))) for key, number in known.items()}
        except (ValueError, TypeError, AttributeError, SafetensorError):
            raise self._damaged(FITTED, "tensors are missing") from None

    def _measured(self, metadata: dict[str, str]) -> dict[str, float]:
        try:
            known = json.loads(metadata.get(MEASURED, "{}"))
            return {str(key): float(loss) for key, loss in known.items()}
        except (ValueError, TypeError, AttributeError):
            raise self._damaged(MEASURED, "not a mapping of numbers") from None

    def _locked(self) -> filelock.BaseFileLock:
        return filelock.FileLock(self.path.with_name(f".{self.path.name}.lock"))

    def _read(self, origin: dict[str, str], cuts: list[SiteCut]) -> dict[SiteCut, ChannelHistory]:
        """Histories of those sites that the file has, checked."""
        with opened(self.path) as (file, metadata):
            self._check_origin(metadata, origin)
            return {cut: self._history(file, metadata, cut) for cut in cuts if f"{_place(cut)}.tokens" in metadata}

    def _check_origin(self, metadata: dict[str, str], origin: dict[str, str]) -> None:
        for key, meaning in ORIGINS.items():
            if metadata.get(key) != origin[key]:
                raise DataError(
                    f"{self.path}: these statistics are of {meaning} ({key} {_short(metadata.get(key))}, this run has "
                    f"{_short(origin[key])}); name another file, or delete this one to gather them anew"
                )

    def _history(self, file: Any, metadata: dict[str, str], cut: SiteCut) -> ChannelHistory:
        place, found = _place(cut), {}
        if cut.site.routed and metadata[f"{place}.tokens"] == "0.0":  # no token has reached it
            return ChannelHistory(cut.site.channels, cut.history.device)
        channels, stored = cut.site.channels, set(file.keys())
        for name in PARTS if cut.state.statistic is not None else ("mean",):
            if f"{place}.{name}" not in stored:
                raise self._damaged(f"{place}.{name}", "is not there")
            tensor = found[name] = file.get_tensor(f"{place}.{name}").to(cut.history.device)
            positions = found["table"].shape[0] if "table" in found and found["table"].dim() else 0
            fits = tensor.shape == {"table": (positions, channels), "rows": (positions,), "mean": (channels,)}[name]
            if tensor.dtype != torch.float32 or not fits or not bool(torch.isfinite(tensor).all()):
                what = f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
                raise self._damaged(f"{place}.{name}", f"{what}, where {channels} finite float32 channels belong")
        try:
            tokens = float(metadata[f"{place}.tokens"])
            if not 0 <= tokens < float("inf"):
                raise ValueError
        except ValueError:
            raise self._damaged(
                f"{place}.tokens", f"{metadata[f'{place}.tokens']!r} is not a number of tokens"
            ) from None
        return ChannelHistory(channels, cut.history.device, **found, tokens=tokens)

    def _damaged(self, what: str, how: str) -> DataError:
        return DataError(f"{self.path}: {what} is damaged: {how}; delete the file to gather it anew")

    def _write(
        self,
        origin: dict[str, str],
        cuts: list[SiteCut],
        measured: Mapping[str, float] | None = None,
        fits: Fits | None = None,
    ) -> None:
        """Add these sites' statistics, measured numbers and fits to what the file has, through a temporary file."""
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        if self.path.exists():
            with opened(self.path) as (file, stored):
                self._check_origin(stored, origin)  # another run may have written it since then
                metadata.update(stored)
                names = file.keys()  # the file itself cannot be gone through
                tensors.update((name, file.get_tensor(name)) for name in names)
        for cut in cuts:
            place, history = _place(cut), cut.history
            for name in PARTS:
                if getattr(history, name) is not None and (name == "mean" or history.positions):
                    tensors[f"{place}.{name}"] = getattr(history, name).cpu().contiguous()
            metadata[f"{place}.tokens"] = repr(history.tokens)
        if measured:
            metadata[MEASURED] = json.dumps({**self._measured(metadata), **measured})
        for key, parts in (fits or {}).items():
            tensors.update(zip(_fit_names(key, len(parts)), parts, strict=True))
        if fits:
            known = json.loads(metadata.get(FITTED, "{}"))
            metadata[FITTED] = json.dumps(known | {key: len(parts) for key, parts in fits.items()})
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            save_file(tensors, temporary, {**metadata, **origin, "format": FORMAT})
            make_readable(temporary)
            os.replace(temporary, self.path)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path}: the statistics cannot be written: {error}") from error
        finally:
            with suppress(OSError):
                temporary.unlink()


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A statistics file that is open for reading, and its metadata."""
    with ExitStack() as stack:
        try:
            check_regular(path)
            file = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(
                f"{path} cannot be read as statistics ({error}); name another file, or delete this one"
            ) from error
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise DataError(
                f"{path} holds no statistics of this version (format {metadata.get('format')!r}, expected {FORMAT!r}); "
                "name another file, or delete this one to gather them anew"
            )
        yield file, metadata


def _place(cut: SiteCut) -> str:
    """The name of a site's statistic in the file: the consumer's path and what is kept of its input."""
    statistic = cut.state.statistic
    if statistic is None:
        return f"{cut.site.consumer}:none"
    weighted = ":router_weights" if cut.state.router_weights else ""
    cls, options = statistic.identity
    module = MODULES.get(cls.__module__, cls.__module__)
    return (
        f"{cut.site.consumer}:{module}.{cls.__qualname__}:{json.dumps(json.loads(options), sort_keys=True)}{weighted}"
    )


def _fit_names(key: str, number: int) -> list[str]:
    """The names of the tensors in the file that were fitted together."""
    return [f"fit.{hashlib.sha256(key.encode()).hexdigest()[:16]}.{place}" for place in range(number)]


def _short(value: str | None) -> str:
    return "unknown" if value is None else value[:12] + ("..." if len(value) > 12 else "")


def check_place(path: Path) -> None:
    """Raise :class:`DataError` where the file could not be written, before hours of calibration."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        what = "is a folder" if path.is_dir() else f"cannot be written: {folder} is not a folder that can be written to"
        raise DataError(f"{path} {what}; name a file in a folder that exists")
