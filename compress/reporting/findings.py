"""Reads an ablation's store, a run's folder or the demo's folder into one list of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..runs.records import REMEDY, read_results

SQLITE = b"SQLite format 3\0"


@dataclass(frozen=True)
class Trial:
    """One pruning and what was measured on it."""

    number: int
    settings: dict[str, Any]
    """Axis -> value or label."""
    status: str = "done"
    """``done``, ``failed`` or ``waiting``."""
    data: dict[str, Any] | None = None
    """What results.json holds, where the trial is done."""
    resolved: str | None = None
    error: str | None = None
    seconds: float | None = None

    @property
    def outcomes(self) -> list[dict[str, Any]]:
        """What each evaluator found."""
        return self.data["metrics"] if self.data else []

    @property
    def label(self) -> str:
        """The settings in a row."""
        return ", ".join(named_text(name, value) for name, value in self.settings.items()) or "the run"

    def outcome(self, label: str) -> dict[str, Any] | None:
        """What the evaluator of that label found, if it ran."""
        return next((found for found in self.outcomes if found["label"] == label), None)


@dataclass(frozen=True)
class Findings:
    """What a report is about."""

    title: str
    source: Path
    trials: tuple[Trial, ...]
    axes: dict[str, list[Any]] = field(default_factory=dict)
    """What was varied, in order, and the values."""
    published: tuple[dict[str, Any], ...] = ()
    text: str | None = None
    """The study's file, or the run's resolved pipeline."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "done" and trial.data]

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.status == "failed"]

    @property
    def waiting(self) -> int:
        return sum(trial.status == "waiting" for trial in self.trials)


def read(source: Path) -> Findings:
    """What a store or a folder holds; raises :class:`SpecError` where it is neither, or nothing is done yet."""
    source = Path(source).expanduser()
    if source.is_dir():
        found = _folder(source)
    elif source.is_file():
        found = _store(source)
    else:
        raise SpecError(f"there is no {source}; {REMEDY}")
    if not found.done:
        states = f"{len(found.failed)} failed, {found.waiting} waiting"
        first = f"; the first error: {found.failed[0].error}" if found.failed else ""
        raise SpecError(f"{source}: no trial is finished ({states}), so there is nothing to report{first}")
    return found


def _folder(folder: Path) -> Findings:
    data = read_results(folder).as_json()
    if "runs" not in data:
        resolved = _text(folder / "resolved.yaml")
        settings = {"prune.use": data["strategy"], "prune.ratio": data["ratio"]["asked"]}
        trial = Trial(1, settings, data=data, resolved=resolved, seconds=data["seconds"]["total"])
        return Findings(
            f"{setting_text('prune.use', data['strategy'])} on {data['model']['name']}",
            folder,
            (trial,),
            {},
            (),
            resolved,
        )
    trials = []
    for number, run in enumerate(data["runs"], 1):
        settings = {"prune.use": run["strategy"], "prune.ratio": run["ratio"]["asked"], "text": run["situation"]}
        resolved = _text(folder / run["pipeline"])
        trials.append(Trial(number, settings, "done", run, resolved, None, run["seconds"]["total"]))
    axes = (
        {name: list(dict.fromkeys(t.settings[name] for t in trials)) for name in trials[0].settings} if trials else {}
    )
    return Findings("Strategies compared", folder, tuple(trials), axes)


def _store(path: Path) -> Findings:
    try:
        with open(path, "rb") as file:
            begin = file.read(len(SQLITE))
    except OSError as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    if begin != SQLITE:
        raise SpecError(f"{path} is no store of an ablation; {REMEDY}")
    from ..ablation.store import Store

    fields = ("number", "settings", "status", "resolved", "error", "seconds")
    with Store.open(path) as store:
        study, stored = store.study, store.trials
    trials = tuple(
        Trial(
            **{name: getattr(trial, name) for name in fields},
            data=trial.result.as_json() if trial.result is not None else None,
        )
        for trial in stored
    )
    return Findings(
        title=study.title or path.stem,
        source=path,
        trials=trials,
        axes=study.axes,
        published=tuple(entry.model_dump() for entry in study.published),
        text=study.text,
        versions=study.versions,
    )


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def finite(value: Any) -> float | None:
    """A number that can be compared and drawn, else None (results.json writes infinity and NaN as words)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def setting_text(name: str, value: Any) -> str:
    """A setting's value as people read it: 40%, pp, a mapping as ``name key value``."""
    from ..output.formatting import TITLES, sentence, share

    if name.endswith("ratio") and finite(value) is not None and 0 <= value <= 1:
        return share(value)
    if name.endswith(("use", "strategy")) and isinstance(value, str):
        return TITLES.get(value, value)
    if isinstance(value, Mapping):
        rest = {key: item for key, item in value.items() if key not in ("name", "use")}
        named = value.get("name", value.get("use"))
        return " ".join(filter(None, (str(named) if named is not None else "", sentence(rest))))
    if isinstance(value, (list, tuple)):
        return " ".join(setting_text("", item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def named_text(name: str, value: Any) -> str:
    """:func:`setting_text`, with the setting's name where the value alone would say nothing."""
    text = setting_text(name, value)
    alone = isinstance(value, str) or name.endswith("ratio")
    return text if alone else f"{axis_title(name)} {text}"


def axis_title(name: str) -> str:
    """prune.use -> strategy, prune.selector.rows -> selector rows, evaluate.0.window -> window."""
    special = {"prune.use": "strategy", "prune.ratio": "ratio"}
    parts = [part for part in name.removeprefix("prune.").split(".") if not part.isdigit() and part != "evaluate"]
    return special.get(name, " ".join(parts).replace("_", " ") or name)
