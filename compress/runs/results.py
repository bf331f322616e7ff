"""What a pipeline run found out, and the folder it is written to: whole, or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..output.folders import write_json
from ..output.records import as_number
from .records import RESULTS, RunResult
from .report import markdown


@dataclass
class Results:
    """What a run found, and what belongs to it in the results folder."""

    record: RunResult
    resolved: str
    """The pipeline file with every default written out."""
    trace: list[dict[str, Any]] | None = None
    folder: Path | None = None
    """Where it was written, once it was."""
    failed: list[str] = field(default_factory=list)
    """A sentence on each evaluator that has no values, because its plugin failed."""

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """``{"dense": ..., "pruned": ...}`` by ``evaluator.value``; without dense where none was measured."""
        found: dict[str, dict[str, Any]] = {}
        for metric in self.record.metrics:
            for name, value in metric.pruned.items():
                dense = {} if metric.dense is None else {"dense": as_number(metric.dense.get(name))}
                found[f"{metric.label}.{name}"] = {**dense, "pruned": as_number(value)}
        return found

    def write(self, folder: Path) -> None:
        """Write results.json, resolved.yaml, report.md and, with a trace, decisions.jsonl into a folder.

        Raises :class:`SpecError` where the disk does not take them.
        """
        try:
            write_json(folder / RESULTS, self.record.as_json())
            (folder / "resolved.yaml").write_text(self.resolved, encoding="utf-8")
            (folder / "report.md").write_text(markdown(self.record), encoding="utf-8")
            if self.trace is not None:
                with open(folder / "decisions.jsonl", "w", encoding="utf-8") as file:
                    for record in self.trace:
                        file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise SpecError(
                f"the results cannot be written below {folder.parent}: {error.strerror or error}; make room there, or "
                "name another place with --out"
            ) from None
