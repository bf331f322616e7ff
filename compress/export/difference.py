"""``prunekit diff``: the differences in settings, measurements and kept units of two exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...registry import DataError
from ..files.dotted import resolved_settings, resolved_text
from ..models.exported.manifest import RECIPE, Manifest, read_kept, read_manifest
from ..output import printing
from ..output.formatting import number, share
from .card import metric_rows

FACTS = ("profile", "strategy", "weights", "license")


def show(a: Path, b: Path) -> None:
    """Print the differences.

    Raises :class:`DataError` for a folder that is not an export, and for exports of models with different layers.
    """
    a, b = Path(a).expanduser(), Path(b).expanduser()
    ours, theirs = read_manifest(a), read_manifest(b)
    names, (totals, rows) = _names(a, b), kept(a, b, ours, theirs)
    head = (*(f"{n} keeps" for n in names), "in both", "of those kept by either")
    printing.show_table(("", *names), settings(a, b, ours, theirs) or [("same settings", "", "")], left=3)
    printing.show_table(("measurement", *names), measurements(ours, theirs))
    if read_kept(a) is None or read_kept(b) is None:
        printing.say("units are listed where a cut is made once; the counts are those of every batch")
    printing.show_table(("all layers", *head), totals)
    printing.show_table(("layer", *head), rows)


def _names(a: Path, b: Path) -> tuple[str, str]:
    return (a.name, b.name) if a.name != b.name else (str(a), str(b))


def settings(a: Path, b: Path, ours: Manifest, theirs: Manifest) -> list[tuple[str, str, str]]:
    """Rows of the differences in profile, options, base model and recipe."""
    pairs: list[tuple[str, Any, Any]] = [(key, getattr(ours, key), getattr(theirs, key)) for key in FACTS]
    pairs += [(key, getattr(ours.base, key), getattr(theirs.base, key)) for key in ("name", "fingerprint")]
    pairs += [(f"--{key}", getattr(ours.options, key), getattr(theirs.options, key)) for key in ("multiple", "freeze")]
    mine, other = (resolved_settings(resolved_text(f / RECIPE)) for f in (a, b))
    pairs += [(key, mine.get(key), other.get(key)) for key in sorted({*mine, *other}) if not key.startswith("output")]
    return [(key, _short(x), _short(y)) for key, x, y in pairs if x != y]


def measurements(ours: Manifest, theirs: Manifest) -> list[tuple[str, str, str]]:
    """Rows of the values that either measured."""
    mine, other = ({row[0]: row[-1] for row in metric_rows(m)} for m in (ours, theirs))
    rows = [(key, mine.get(key, "-"), other.get(key, "-")) for key in dict.fromkeys([*mine, *other])]
    return [*rows, ("units cut", share(ours.ratio.units_cut), share(theirs.ratio.units_cut))]


Rows = list[tuple[str, ...]]


def kept(a: Path, b: Path, ours: Manifest, theirs: Manifest) -> tuple[Rows, Rows]:
    """Rows by kind over all layers, and by layer and kind: counts, and how many units both keep.

    The counts alone for a cut made per batch.
    """
    one, two = (
        {(layer.layer, kind): site for layer in manifest.layers for kind, site in layer.sites.items()}
        for manifest in (ours, theirs)
    )
    if {key: site.units for key, site in one.items()} != {key: site.units for key, site in two.items()}:
        raise DataError(f"{a} and {b} are of models with other layers or units; compare exports of one base model")
    first, second = read_kept(a), read_kept(b)
    rows: Rows = []
    sums: dict[str, list[int]] = {}
    for (layer, kind), site in one.items():
        counts = [site.units, site.kept, two[layer, kind].kept]
        if first is not None and second is not None:
            mine, other = set(first[layer, kind]), set(second[layer, kind])
            counts += [len(mine & other), len(mine | other)]
        rows.append(_row(f"{layer} {kind}", *counts))
        total = sums.setdefault(kind, [0] * len(counts))
        sums[kind] = [sum(pair) for pair in zip(total, counts, strict=True)]
    return [_row(kind, *counts) for kind, counts in sums.items()], rows


def _row(title: str, units: int, ours: int, theirs: int, both: int | None = None, either: int = 0) -> tuple[str, ...]:
    shared = ("-", "-") if both is None else (number(both), share(both / max(1, either)))
    return f"{title} ({number(units)})", number(ours), number(theirs), *shared


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "-" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
