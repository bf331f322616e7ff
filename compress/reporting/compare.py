"""``prunekit compare``: two runs side by side on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..output import printing
from ..output.formatting import number
from ..runs.records import RunResult, read_results
from ..runs.report import headline
from . import differences
from .bootstrap import FEW_WINDOWS, Windows, paired_interval, unpaired

TAKES = "prunekit compare takes two folders written by prunekit run"


def compare(a: Path, b: Path, samples: int = 10_000, seed: int = 0) -> None:
    """Print what two results folders differ in, and how sure the difference of their perplexities is.

    ``samples`` and ``seed`` are of the bootstrap over windows. Raises :class:`SpecError` for a folder that holds
    no results of one run.
    """
    folders = [Path(a).expanduser(), Path(b).expanduser()]
    first, second = (_one_run(folder) for folder in folders)
    for name, folder, data in zip("AB", folders, (first, second), strict=True):
        printing.say(f"{name}: {folder}", whole=True)
        printing.say(f"   {headline(RunResult.model_validate(data))}")
    printing.say("")
    resolved = [_resolved(folder) for folder in folders]
    _differing("settings that differ", differences.settings(*resolved), "the settings are the same")
    _differing("model, machine and versions that differ", differences.origins(first, second), "model, machine and "
               "versions are the same")  # fmt: skip
    if None in resolved:
        # Without the pipelines, the protocols still say how the numbers were measured.
        _differing("protocols that differ", differences.protocols(first, second), "the protocols are the same")
    head = ("measurement", "dense", "A", "B", "B to A")
    printing.show_table(head, differences.results(first, second), title="results")
    for sentence in [*differences.unlike(first, second), *intervals(first, second, samples, seed)]:
        printing.say(sentence)


def intervals(a: dict[str, Any], b: dict[str, Any], samples: int, seed: int) -> list[str]:
    """A sentence for every perplexity that both runs measured: its interval, or why there is none."""
    others = {outcome["label"]: outcome for outcome in b["metrics"]}
    pairs = [(o, others[o["label"]]) for o in a["metrics"] if o["evaluator"] == "perplexity" and o["label"] in others]
    if not pairs:
        return ["no interval: the runs share no perplexity measurement"]
    prints = [data["model"].get("fingerprint") for data in (a, b)]
    if prints[0] != prints[1]:
        return [
            f"no interval: the dense models differ (fingerprints {str(prints[0])[:12]} and {str(prints[1])[:12]}), so "
            "the difference would be theirs as much as the pruning's"
        ]
    return [_interval(first, second, samples, seed) for first, second in pairs]


def _interval(a: dict[str, Any], b: dict[str, Any], samples: int, seed: int) -> str:
    label = a["label"]
    why = unpaired(a, b)
    if why:
        return f"{label}: no interval: {why}"
    found = paired_interval(Windows.of(a), Windows.of(b), samples, seed)
    if found is None:
        return f"{label}: no interval: the perplexities are too large"
    verdict = "which leaves out zero" if found.certain else "which holds zero: no difference is shown"
    few = f" With only {found.windows} windows it is too short." if found.windows < FEW_WINDOWS else ""
    return (
        f"{label}: B - A = {_signed(found.difference)}, 95% interval {_signed(found.low)} to {_signed(found.high)}, "
        f"{verdict}; B / A = {found.ratio:.4f}, {found.ratio_low:.4f} to {found.ratio_high:.4f}. Paired bootstrap over "
        f"{found.windows} windows, {found.samples:,} samples, seed {found.seed}; it covers the choice of text, not of "
        f"seeds.{few}"
    )


def _signed(value: float) -> str:
    return ("-" if value < 0 else "+") + number(abs(value))


def _one_run(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise SpecError(f"{folder} is a file, and {TAKES}; prunekit report shows the store of an ablation")
    if not (folder / "results.json").is_file():
        what = "is no results folder (no results.json in it)" if folder.is_dir() else "is not there"
        raise SpecError(f"{folder} {what}; {TAKES}")
    data = read_results(folder).as_json()
    if "runs" in data:
        raise SpecError(
            f"{folder} holds {len(data['runs'])} runs, and compare takes folders of one run each; "
            "prunekit report compares them all"
        )
    return data


def _resolved(folder: Path) -> str | None:
    path = folder / "resolved.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _differing(title: str, lines: list[differences.Line], none: str) -> None:
    if lines:
        printing.show_table(("", "A", "B"), lines, left=3, title=title)
    else:
        printing.say(f"{none}\n")
