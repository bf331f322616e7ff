"""``prunekit verify``: checks the files, the model and the recorded values of an exported folder."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...registry import NonFiniteError, PrunekitError
from ..models.exported.manifest import GGUF, ExportMetric, Manifest, damages, read_manifest
from ..models.loading import Loaded, fingerprint
from ..output import printing
from ..output.formatting import number
from ..pruning.pruned import Pruned
from ..runs.provenance import versions
from . import reload
from .measures import measure as measured_by
from .measures import recorded

TOLERANCE = 1e-3
"""Relative difference that is accepted between a recorded value and one of another machine or kernel."""

State = Literal["holds", "fails", "differs", "not checked"]


@dataclass(frozen=True)
class Check:
    """One check and its result; ``differs`` is reported without a failure."""

    what: str
    state: State
    detail: str


def verify(
    folder: Path, base: str | None, plugins: Sequence[Path], measure: bool = True, trust_remote_code: bool = False
) -> bool:
    """Check a folder, print a line for each check, and return whether no check failed.

    Raises :class:`DataError` for a folder that is not an export.
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
    manifest: Manifest,
    base: str | None,
    plugins: Sequence[Path],
    measure: bool,
    trust_remote_code: bool,
    progress: Any,
) -> Iterator[Check]:
    """Run the checks in order; checks that need one that failed are not run."""
    found = damages(folder, manifest)
    count = len(manifest.files)
    yield Check("files", "fails" if found else "holds", "; ".join(found) or f"{count} files, sizes and sha256")
    yield _versions(manifest.versions)
    if found:
        yield Check("loading", "not checked", "the files must be complete and unchanged first")
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
    for metric in manifest.metrics:
        if manifest.profile == "gguf" and metric.evaluator["name"] != "perplexity":
            yield Check(metric.label, "not checked", "of a GGUF only perplexity is measured")
            continue
        yield _measured(metric, manifest, loaded, pruned, plugins, progress, trust_remote_code)
    if not manifest.metrics:
        yield Check("measurements", "not checked", "none were recorded")


class _NotHere(Exception):
    """A check cannot run here: something that it needs is not installed or not named."""


def _loaded(
    folder: Path, manifest: Manifest, base: str | None, plugins: Sequence[Path], trust: bool
) -> tuple[Loaded, Pruned | None]:
    if manifest.profile == "gguf":
        try:
            from .gguf.model import load_gguf

            return load_gguf(folder / GGUF, folder), None
        except ImportError as error:
            raise _NotHere("llama-cpp-python is not installed, so nothing here runs a GGUF (pip install it)") from error
    files = manifest.plugin_files
    if manifest.profile == "dynamic" and files and not plugins:
        raise _NotHere(f"its strategy comes from {', '.join(files)}, which is run only where named (--plugin)")
    # The files were compared before; the weights are compared next.
    found = reload.load(folder, base=base, plugins=plugins, trust_remote_code=trust, check=False)
    return found.loaded, found.pruned


def _versions(then: dict[str, str]) -> Check:
    now = versions()
    changed = [
        f"{name} {was} is {now.get(name, 'not there')} now" for name, was in then.items() if was != now.get(name)
    ]
    return Check("versions", "differs" if changed else "holds", "; ".join(changed) or "as when it was written")


def _weights(manifest: Manifest, loaded: Loaded) -> Check:
    expected = manifest.weights
    if expected is None:
        return Check("loading", "holds", f"llama.cpp loads it (llama-cpp-python {_version('llama-cpp-python')})")
    same = fingerprint(loaded.model) == expected
    what = "the model that is loaded has the weights that were written"
    return Check("loading", "holds" if same else "fails", what if same else "its weights differ from those written")


def _measured(
    metric: ExportMetric,
    manifest: Manifest,
    loaded: Loaded,
    pruned: Pruned | None,
    plugins: Sequence[Path],
    progress: Any,
    trust: bool,
) -> Check:
    label, seed = metric.label, manifest.seeds["pipeline"]
    try:
        evaluator = recorded(metric, plugins, trust)
        found = measured_by(evaluator, loaded, seed, "again", pruned, progress).values
    except NonFiniteError as error:
        return Check(label, "fails", str(error))
    except PrunekitError as error:
        return Check(label, "not checked", f"cannot be measured here: {error}")
    far, lines = [], []
    for key, then in metric.exported.items():
        value = found.get(key)
        lines.append(f"{key} {number(then)} recorded, {number(value)} now")
        if then is not None and not _close(then, value):
            far.append(key)
    return Check(label, "fails" if far else "holds", "; ".join(lines))


def _close(recorded: Any, value: Any) -> bool:
    """Whether a value is the recorded one; JSON holds infinity and NaN as their names."""
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
