"""Tasks for lm-evaluation-harness that come with the package, so that zero-shot accuracy is measured offline."""

from pathlib import Path

FOLDER: Path = Path(__file__).resolve().parent
TRUE_CONTINUATION: Path = FOLDER / "true_continuation" / "questions.jsonl"

__all__ = ["FOLDER", "TRUE_CONTINUATION"]
