"""Writes a benchmark's page."""

from pathlib import Path


def put(page: str, out: Path | None) -> None:
    """Write the page to ``out``, or print it."""
    if out is None:
        print(page, end="")
    else:
        out.write_text(page, encoding="utf-8")
