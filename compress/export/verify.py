"""``prunekit verify``: checks the files, the model and the recorded values of an exported folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ...registry import NonFiniteError, PrunekitError
from ..calibration.passes import Progress
from ..models.exported.manifest import GGUF, ExportMetric, Manifest, damages, read_manifest
from ..models.loading import Loaded, fingerprint
from ..output import printing
from ..output.formatting import number
from ..pruning.pruned import Pruned
from ..runs.measuring import Unpruned
from ..runs.plan import Say, planned, silent
from ..runs.provenance import versions
from . import reload
from .measures import measure, recorded

TOLERANCE = 1e-3
"""Relative difference that is accepted between a recorded value and one of another machine or kernel."""

State = Literal["holds", "fails", "differs", "not checked"]


@dataclass(frozen=True)
class Check:
    """One check and its result; ``differs`` is reported without a failure."""

    what: str
    state: State
    detail: str


class _NotHere(Exception):
    """A check cannot run here: something that it needs is not installed, or not named by the user."""


def verify(
    folder: Path,
    base: str | None,
    plugins: Sequence[Path],
    measure: bool = True,
    trust_remote_code: bool = False,
    strict: bool = False,
) -> bool:
    """Check a folder, print a line for each check, and return whether no check failed; if ``strict``, all were made.

    Raises :class:`DataError` for a folder that is not an export.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    with printing.Bars() as bars:
        verification = Verification(folder, manifest, base, plugins, measure, trust_remote_code, bars.track, bars.say)
        found = list(verification.checks())
    rows = [(check.what, check.state, check.detail) for check in found]
    printing.show_table(("check", "", "what was found"), rows, left=3)
    printing.say(f"{folder}: {verdict(found)}", whole=True)
    return not any(check.state == "fails" or (strict and check.state == "not checked") for check in found)


def verdict(found: Sequence[Check]) -> str:
    """What the checks say together: a check that was not made is named."""
    if any(check.state == "fails" for check in found):
        return "does not hold"
    left = [check.what for check in found if check.state == "not checked"]
    return f"holds as far as checked; not checked: {', '.join(left)}" if left else "holds"


@dataclass(frozen=True)
class Verification:
    """The checks of one folder, with the user's options."""

    folder: Path
    manifest: Manifest
    base: str | None
    plugins: Sequence[Path]
    measure: bool
    trust_remote_code: bool
    progress: Progress
    say: Say = silent

    def checks(self) -> Iterator[Check]:
        """Run the checks in order; checks that need one that failed are not run."""
        manifest = self.manifest
        found = damages(self.folder, manifest)
        whole = f"{len(manifest.files)} files, sizes and sha256"
        yield Check("files", "fails" if found else "holds", "; ".join(found) or whole)
        yield _versions(manifest.versions)
        if found:
            yield Check("loading", "not checked", "the files must be complete and unchanged first")
            return
        try:
            loaded, pruned = self._load()
        except _NotHere as missing:
            yield Check("loading", "not checked", str(missing))
            return
        except PrunekitError as error:
            yield Check("loading", "fails", str(error))
            return
        yield _weights(manifest, loaded)
        if not self.measure:
            yield Check("measurements", "not checked", "--no-measure")
            return
        for metric in manifest.metrics:
            yield self._measured(metric, loaded, pruned)
        if not manifest.metrics:
            yield Check("measurements", "not checked", "none were recorded")

    def _load(self) -> tuple[Loaded, Pruned | None]:
        """The model, and its pruning if it decides per batch."""
        if self.manifest.profile == "gguf":
            try:
                from .gguf.model import load_gguf

                return load_gguf(self.folder / GGUF, self.folder), None
            except ImportError as error:
                raise _NotHere(
                    "llama-cpp-python is not installed, so nothing here runs a GGUF (pip install it)"
                ) from error
        files = self.manifest.plugin_files
        if self.manifest.profile == "dynamic" and files and not self.plugins:
            raise _NotHere(f"its strategy comes from {', '.join(files)}, which is run only where named (--plugin)")
        # The files were compared before; the weights are compared next.
        found = reload.load(
            self.folder,
            base=self.base,
            plugins=self.plugins,
            trust_remote_code=self.trust_remote_code,
            check=False,
        )
        return found.loaded, found.pruned

    def _measured(self, metric: ExportMetric, loaded: Loaded, pruned: Pruned | None) -> Check:
        """Measure again, and compare with the recorded values."""
        label, seed = metric.label, self.manifest.seeds["pipeline"]
        if self.manifest.profile == "gguf" and metric.evaluator["name"] != "perplexity":
            return Check(label, "not checked", "of a GGUF only perplexity is measured")
        try:
            evaluator = recorded(metric, self.plugins, self.trust_remote_code)
            for line in planned(None, [(label, evaluator)], Unpruned(loaded), "the exported model"):
                self.say(line)
            found = measure(evaluator, loaded, seed, "again", pruned, self.progress).values
        except NonFiniteError as error:
            return Check(label, "fails", str(error))
        except PrunekitError as error:
            return Check(label, "not checked", f"cannot be measured here: {error}")
        then = metric.exported
        lines = [f"{key} {number(then[key])} recorded, {number(found.get(key))} now" for key in then]
        close = all(then[key] is None or _close(then[key], found.get(key)) for key in then)
        return Check(label, "holds" if close else "fails", "; ".join(lines))


def _versions(then: dict[str, str]) -> Check:
    now = versions()
    changed = [
        f"{name} {was} is {now.get(name, 'not there')} now" for name, was in then.items() if was != now.get(name)
    ]
    return Check("versions", "differs" if changed else "holds", "; ".join(changed) or "as when it was written")


def _weights(manifest: Manifest, loaded: Loaded) -> Check:
    if manifest.weights is None:
        import llama_cpp

        return Check("loading", "holds", f"llama.cpp loads it (llama-cpp-python {llama_cpp.__version__})")
    if fingerprint(loaded.model) != manifest.weights:
        return Check("loading", "fails", "its weights differ from those written")
    return Check("loading", "holds", "the model that is loaded has the weights that were written")


def _close(recorded: Any, value: Any) -> bool:
    """Whether a value is the recorded one; JSON holds infinity and NaN as their names."""
    try:
        then, now = float(recorded), float(value)
    except (TypeError, ValueError):
        return False
    return then == now or abs(now - then) <= TOLERANCE * max(abs(then), 1e-12)
