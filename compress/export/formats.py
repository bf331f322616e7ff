"""Runs the export formats of plugins."""

from __future__ import annotations

from pathlib import Path

from ...registry import ExportFormat, PluginError, PrunekitError
from ...registry.catalog import named
from ..models.loading import Loaded
from ..output.failures import blamed


def write_format(own: ExportFormat, loaded: Loaded, folder: Path) -> list[str]:
    """Have a format write the loaded model into its subfolder of an exported folder; returns notes.

    Raises :class:`PluginError`, which names the format, for an error that comes out of it, for a format that writes
    nothing, and for one that changes other files of the folder.
    """
    target, before = folder / own.name, _files(folder)
    target.mkdir()
    try:
        notes = own.write(loaded.model, loaded.tokenizer, target)
    except PrunekitError:
        raise
    except Exception as error:
        message = blamed(error)
        if message is None:
            raise
        raise PluginError(message) from error
    after = _files(folder)
    others = {path: stamp for path, stamp in after.items() if target not in path.parents}
    if others != before or len(after) == len(others):
        what = "has written no file" if others == before else "has changed files outside of its folder"
        raise PluginError(f"{named(own)} {what}, so nothing was written; fix the plugin")
    return [f"written as {own.name}, too: folder {own.name}", *(notes or ())]


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file of a folder."""
    stats = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats}
