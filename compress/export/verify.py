"""``prunekit verify``: do the files, the model and the recorded numbers of an exported folder still hold?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...registry import NonFiniteError, PrunekitError
from ..models.exported.manifest import GGUF, damages, read_manifest
from ..models.loading import Loaded, fingerprint
from ..output import printing
from ..output.formatting import number
from ..pruning.pruned import Pruned
from ..runs.provenance import versions
from . import reload
from .measures import measure as measured_by
from .measures import recorded

TOLERANCE = 1e-3
"""Share by which a perplexity measured elsewhere (another machine, another kernel) may differ and still hold."""

State = Literal["holds", "fails", "differs", "not checked"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``differs`` is worth knowing and does not fail."""

    what: str
    state: State
    detail: str


def verify(
    folder: Path, base: str | None, plugins: Sequence[Path], measure: bool = True, trust_remote_code: bool = False
) -> bool:
    """Check a folder, show a line for each check, and say whether all of it holds.

    Raises :class:`DataError` for a folder that is no export at all.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    held = True
    rows = []
    with printing.Bars() as bars:
        for check in checks(folder, manifest, base, plugins, measure, trust_remote_code, bars.track):
            held &= check.state != "fails"
            rows.append((check.what, check.state, check.detail))
    printing.show_table(("check", "", "what was found"), rows, left=3)
    printing.say(f"{folder}: {'holds' if held else 'does not hold'}", whole=True)
    return held


def checks(
    folder: Path,
    manifest: dict[str, Any],
    base: str | None,
    plugins: Sequence[Path],
    measure: bool,
    trust_remote_code: bool,
    progress: Any,
) -> Iterator[Check]:
    """The checks one after the other; what builds on one that failed is not checked."""
    found = damages(folder, manifest)
    count = len(manifest["files"])
    yield Check("files", "fails" if found else "holds", "; ".join(found) or f"{count} files, sizes and sha256")
    yield _versions(manifest)
    if found:
        yield Check("loading", "not checked", "the files have to be whole first")
        return
    try:
        loaded, pruned = _loaded(folder, manifest, base, plugins, trust_remote_code)
    except _NotHere as missing:
        yield Check("loading", "not checked", str(missing))
        return
    except PrunekitError as error:
        yield Check("loading", "fails", str(error))
        return
    yield _weights(manifest, loaded)
    if not measure:
        yield Check("measurements", "not checked", "--no-measure")
        return
    for metric in manifest["metrics"]:
        if manifest["profile"] == "gguf" and metric["evaluator"]["name"] != "perplexity":
            yield Check(metric["label"], "not checked", "of a GGUF only perplexity is measured")
            continue
        yield _measured(metric, manifest, loaded, pruned, plugins, progress, trust_remote_code)
    if not manifest["metrics"]:
        yield Check("measurements", "not checked", "none were recorded")


class _NotHere(Exception):
    """What a check needs is not installed."""


def _loaded(
    folder: Path, manifest: dict[str, Any], base: str | None, plugins: Sequence[Path], trust: bool
) -> tuple[Loaded, Pruned | None]:
    if manifest["profile"] == "gguf":
        try:
            from .gguf.model import load_gguf

            return load_gguf(folder / GGUF, folder), None
        except ImportError as error:
            raise _NotHere("llama-cpp-python is not installed, so nothing here runs a GGUF (pip install it)") from error
    files = manifest.get("plugin_files")
    if manifest["profile"] == "dynamic" and files and not plugins:
        raise _NotHere(f"its strategy comes from {', '.join(files)}, which is run only where named (--plugin)")
    found = reload.load_described(folder, manifest, "auto", base, plugins, trust)
    return found.loaded, found.pruned


def _versions(manifest: dict[str, Any]) -> Check:
    now, then = versions(), manifest["versions"]
    changed = [
        f"{name} {was} is {now.get(name, 'not there')} now" for name, was in then.items() if was != now.get(name)
    ]
    return Check("versions", "differs" if changed else "holds", "; ".join(changed) or "as when it was written")


def _weights(manifest: dict[str, Any], loaded: Loaded) -> Check:
    expected = manifest["weights"]
    if expected is None:
        return Check("loading", "holds", f"llama.cpp loads it (llama-cpp-python {_version('llama-cpp-python')})")
    same = fingerprint(loaded.model) == expected
    what = "the model that is loaded has the weights that were written"
    return Check("loading", "holds" if same else "fails", what if same else "its weights differ from those written")


def _measured(
    metric: dict[str, Any],
    manifest: dict[str, Any],
    loaded: Loaded,
    pruned: Pruned | None,
    plugins: Sequence[Path],
    progress: Any,
    trust: bool,
) -> Check:
    label, seed = metric["label"], manifest["seeds"]["pipeline"]
    try:
        evaluator = recorded(metric, plugins, trust)
        found = measured_by(evaluator, loaded, seed, "again", pruned, progress).values
    except NonFiniteError as error:
        return Check(label, "fails", str(error))
    except PrunekitError as error:
        return Check(label, "not checked", f"cannot be measured here: {error}")
    far, said = [], []
    for key, then in metric["exported"].items():
        value = found.get(key)
        said.append(f"{key} {number(then)} recorded, {number(value)} now")
        if then is not None and not _close(then, value):
            far.append(key)
    return Check(label, "fails" if far else "holds", "; ".join(said))


def _close(recorded: Any, value: Any) -> bool:
    """Whether a value is what was recorded; JSON has infinity and NaN as their names."""
    try:
        then, now = float(recorded), float(value)
    except (TypeError, ValueError):
        return False
    return then == now or abs(now - then) <= TOLERANCE * max(abs(then), 1e-12)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
