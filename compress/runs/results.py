"""What a pipeline run found out, and the folder it is written to: whole, or not at all."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...registry import SpecError
from ..output.folders import write_json
from .report import markdown

FORMAT = 1
"""Version of results.json's layout."""


@dataclass
class Results:
    """A run's findings; ``data`` is what results.json holds (docs/pipeline-files.md lists its keys)."""

    data: dict[str, Any]
    resolved: str
    """The pipeline file with every default written out."""
    trace: list[dict[str, Any]] | None = None
    folder: Path | None = None
    """Where it was written, once it was."""

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Every value by ``evaluator.value``: ``{"dense": ..., "pruned": ...}``, dense left out where it is paired."""
        found = {}
        for outcome in self.data["metrics"]:
            for name, value in outcome["pruned"].items():
                both = {} if outcome["dense"] is None else {"dense": outcome["dense"].get(name)}
                found[f"{outcome['label']}.{name}"] = {**both, "pruned": value}
        return found

    def write(self, folder: Path) -> None:
        """Write results.json, resolved.yaml, report.md and, with a trace, decisions.jsonl into a folder.

        Raises :class:`SpecError` where the disk does not take them.
        """
        try:
            write_json(folder / "results.json", self.data)
            (folder / "resolved.yaml").write_text(self.resolved, encoding="utf-8")
            (folder / "report.md").write_text(markdown(self.data), encoding="utf-8")
            if self.trace is not None:
                with open(folder / "decisions.jsonl", "w", encoding="utf-8") as file:
                    for record in self.trace:
                        file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise SpecError(
                f"the results cannot be written below {folder.parent}: {error.strerror or error}; make room there, or "
                "name another place with --out"
            ) from None
