"""The lines that a command prints of its work before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...registry import Evaluator, Subject
from ..files.recover import Recover
from ..output.records import CalibrationFacts

Say = Callable[[str], object]
"""Takes a line for the user."""


def silent(line: str) -> None:
    """Says nothing."""


def planned(
    calibration: CalibrationFacts | None,
    evaluators: Iterable[tuple[str, Evaluator]],
    subject: Subject,
    models: str,
    recover: Recover | None = None,
) -> list[str]:
    """A line for the calibration, for the training and for each evaluator, by its label; ``models`` says what is
    measured.

    Raises the errors of texts that are too short, so that they come before hours of calibration.
    """
    lines = []
    if calibration is not None:
        count = calibration.sequences
        lines.append(f"calibration: {count} sequence{'s' * (count != 1)} of {calibration.length} tokens")
    lines += [] if recover is None else [recover.plan]
    for label, evaluator in evaluators:
        lines.append(": ".join(part for part in (label, evaluator.plan(subject)) if part) + f"; {models}")
    return [f"to do: {line}" for line in lines]
