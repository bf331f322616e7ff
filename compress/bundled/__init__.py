"""A small trained language model and four short texts that come with the package, so that everything runs offline."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL: Path = _HERE / "model"
TEXTS: dict[str, Path] = {
    f"{kind}-{split}": _HERE / "text" / f"{kind}-{split}.txt"
    for kind in ("reference", "docstrings")
    for split in ("calibration", "evaluation")
}

__all__ = ["MODEL", "TEXTS"]
