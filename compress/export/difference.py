"""``prunekit diff``: what two exported folders kept differently, and what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...registry import DataError
from ..files.dotted import resolved_settings
from ..models.exported.manifest import RECIPE, read_kept, read_manifest
from ..output import printing
from ..output.formatting import number, share
from .card import metric_rows

FACTS = ("profile", "strategy", "weights", "license")


def show(a: Path, b: Path) -> None:
    """Print it; raises :class:`DataError` where one is no export, or their bases have other layers."""
    a, b = Path(a).expanduser(), Path(b).expanduser()
    ours, theirs = read_manifest(a), read_manifest(b)
    names, rows = _names(a, b), kept(a, b, ours, theirs)
    printing.show_table(("", *names), settings(a, b, ours, theirs) or [("same settings", "", "")], left=3)
    printing.show_table(("measurement", *names), measurements(ours, theirs))
    if read_kept(a) is None or read_kept(b) is None:
        printing.say("units are listed where a cut is made once; the counts are those of every batch")
    printing.show_table(("layer", *(f"{n} keeps" for n in names), "in both", "of those kept by either"), rows)


def _names(a: Path, b: Path) -> tuple[str, str]:
    return (a.name, b.name) if a.name != b.name else (str(a), str(b))


def settings(a: Path, b: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of what differs in profile, options, base and recipe."""
    pairs = [(key, ours[key], theirs[key]) for key in FACTS]
    pairs += [(key, ours["base"][key], theirs["base"][key]) for key in ("name", "fingerprint")]
    pairs += [(f"--{key}", ours["options"].get(key), theirs["options"].get(key)) for key in ("multiple", "freeze")]
    mine, other = (
        resolved_settings((f / RECIPE).read_text("utf-8") if (f / RECIPE).is_file() else None) for f in (a, b)
    )
    pairs += [(key, mine.get(key), other.get(key)) for key in sorted({*mine, *other}) if not key.startswith("output")]
    return [(key, _short(x), _short(y)) for key, x, y in pairs if x != y]


def measurements(ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of what both measured."""
    mine, other = ({row[0]: row[-1] for row in metric_rows(m)} for m in (ours, theirs))
    rows = [(key, mine.get(key, "-"), other.get(key, "-")) for key in dict.fromkeys([*mine, *other])]
    cut = (share(m["ratio"]["units_cut"]) for m in (ours, theirs))
    return [*rows, ("units cut", *cut)]


def kept(a: Path, b: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows by layer and kind: counts, and how many units both keep; of a cut made per batch the counts alone."""
    sites = [
        {(e["layer"], kind): e[kind] for e in m["layers"] for kind in e if kind != "layer"} for m in (ours, theirs)
    ]
    if {key: s["units"] for key, s in sites[0].items()} != {key: s["units"] for key, s in sites[1].items()}:
        raise DataError(f"{a} and {b} are of models with other layers or units; compare exports of one base model")
    units = read_kept(a), read_kept(b)
    rows, total = [], [0, 0]
    for (layer, kind), whole in sites[0].items():
        counts = [str(s[layer, kind]["kept"]) for s in sites]
        both = of = "-"
        if units[0] is not None and units[1] is not None:
            mine, other = (set(u[layer, kind]) for u in units)
            total[0] += len(mine & other)
            total[1] += len(mine | other)
            both, of = str(len(mine & other)), share(len(mine & other) / max(1, len(mine | other)))
        rows.append((f"{layer} {kind} ({whole['units']})", *counts, both, of))
    if total[1]:
        rows.append(("all", "", "", number(total[0]), share(total[0] / total[1])))
    return rows


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text[:12] if len(text) == 64 else text
