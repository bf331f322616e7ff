"""Numbers, shares and tables as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .reading import brief
from .records import LayerCut, Ratio

TIE = 0.01
"""Perplexities closer than this share are called equal, where nothing is known of their spread."""

ERROR = "_stderr"
"""How the name of a value's standard error ends."""

TITLES = {
    "random": "random",
    "magnitude": "magnitude",
    "wanda_sp": "Wanda-sp",
    "flap": "FLAP",
    "pp": "PP",
    "full_batch_probing": "full-batch probing",
}
"""Display names of the built-in strategies."""


HIDDEN = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]"
)
"""Control characters, marks that turn the direction of text, and halves of surrogate pairs."""

LONGEST_LINE = 2_000

MOST_LINES = 60


def printable(text: str) -> str:
    """``text`` with hidden characters written as escapes such as ``\\x1b``; lines and tabs stay."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def fitting(message: object) -> str:
    """A message of at most about a screenful: its long lines are cut in their middles, and many lines too."""
    lines = [brief(line, LONGEST_LINE) for line in str(message).split("\n")]
    if len(lines) > MOST_LINES:
        left_out = len(lines) - MOST_LINES
        lines[MOST_LINES - 10 : -10] = [f"  ... and {left_out:,} more lines ..."]
    return "\n".join(lines)


def number(value: Any) -> str:
    """A value as people read it: four significant digits, thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != value or abs(value) == float("inf"):
        return str(value)
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3e}"
    digits = max(0, 3 - len(str(int(abs(value)))) + 1)
    return f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """0.4 -> 40%, 11.4 -> 1,140%."""
    if value is None:
        return "-"
    text = f"{100 * value:.3g}"
    return f"{float(text):,.0f}%" if "e+" in text else f"{text}%"


def names_of(values: Mapping[str, Any]) -> list[str]:
    """The names of an evaluator's values, without the standard errors that :func:`value_text` states."""
    return [name for name in values if not (name.endswith(ERROR) and name.removesuffix(ERROR) in values)]


def accuracy_of(values: Mapping[str, Any] | None, name: str) -> tuple[float, float] | None:
    """An accuracy from 0 to 1 and its standard error; None for a value without one.

    The error of the ``mean`` over tasks follows from the tasks' own, taken as independent.
    """
    known = values or {}
    own = [f"{name}{ERROR}"] if name != "mean" else [key for key in known if key.endswith(ERROR)]
    found = [known[key] for key in (name, *own) if key in known]
    shares = [one for one in found if isinstance(one, float) and 0 <= one <= 1]
    if len(found) < 2 or len(shares) < len(found) or name not in known:
        return None
    return shares[0], math.hypot(*shares[1:]) / len(shares[1:])


def value_text(values: Mapping[str, Any] | None, name: str) -> str:
    """A measured value: ``80.0% ± 13.3`` for an accuracy with its standard error, else :func:`number`."""
    known = accuracy_of(values, name)
    return f"{100 * known[0]:.1f}% ± {100 * known[1]:.1f}" if known else number((values or {}).get(name))


def achieved(ratio: Ratio) -> str:
    """ "requested 20%; removed 15.0% of the prunable parameters (10.0% of units)", and the matched cost."""
    asked = "" if ratio.asked is None else f"requested {share(ratio.asked)}; "
    parameters, units = (f"{100 * cut:.1f}%" for cut in (ratio.prunable_parameters_cut, ratio.units_cut))
    text = f"{asked}removed {parameters} of the prunable parameters ({units} of units)"
    found = ratio.matched
    if found is None:
        return text
    cost = f"{100 * found.cost:.1f}% of the dense decoder's {found.counted}"
    return f"{text}; matched: {cost} at a ratio of {found.ratio:.4g}"


def extent(ends: dict[str, float]) -> str:
    """The ``least`` and ``largest`` as one number, or "0.02 to 0.31"."""
    least, largest = (f"{ends[key]:.3g}" for key in ("least", "largest"))
    return least if least == largest else f"{least} to {largest}"


def sentence(facts: dict[str, Any]) -> str:
    """``key value`` pairs in a row."""
    return ", ".join(f"{key.replace('_', ' ')} {fact(value)}" for key, value in facts.items() if value is not None)


def fact(value: Any) -> str:
    """A protocol value as people read it: a sha256 is shortened, a mapping is in brackets."""
    if isinstance(value, dict):
        return f"({sentence(value)})"
    if isinstance(value, str) and value != value.strip():
        return repr(value)
    if isinstance(value, str) and len(value) == 64:
        return f"`{value[:12]}`"  # a sha256: results.json has it whole
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return number(value) if isinstance(value, float) else str(value)


def markdown_text(text: str) -> str:
    """Text that Markdown shows as it is, on one line: what would be a tag, a link, code or emphasis is escaped."""
    text = re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def named_layers(layers: Iterable[int]) -> str:
    """[] -> "none", [0] -> "layer 0", [0, 1, 2] -> "layers 0, 1, 2"; long runs as "layers 0-9, 12"."""
    listed = sorted(layers)
    if not listed:
        return "none"
    numbers = ", ".join(map(str, listed)) if len(listed) <= 4 else ranges(listed)
    return f"layer{'s' * (len(listed) > 1)} {numbers}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A markdown table, its columns aligned in the source too."""
    rows = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|").ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return [lines[0], rule, *lines[1:]]


def kept_units(layers: Sequence[LayerCut], attention: str, mlp: str) -> list[str]:
    """A markdown table of the units that every layer keeps; the names are those of the columns."""
    names = {"attention": attention, "mlp": mlp, "experts": "experts"}
    kinds = [kind for kind in names if any(kind in layer.sites for layer in layers)]
    rows = [(str(layer.layer), *(layer.sites[k].text if k in layer.sites else "-" for k in kinds)) for layer in layers]
    if any(layer.expert_channels for layer in layers):
        names["each expert"] = "channels of each expert"
        kinds.append("each expert")
        rows = [(*row, _of_each(layer)) for row, layer in zip(rows, layers, strict=True)]
    return table(("layer", *(names[kind] for kind in kinds)), rows)


def _of_each(layer: LayerCut) -> str:
    """Such as "14 of 24", or "12 to 16 of 24", where experts of a layer differ."""
    if not layer.expert_channels:
        return "-"
    counts = [each.kept for each in layer.expert_channels]
    least, most = min(counts), max(counts)
    return f"{least if least == most else f'{least} to {most}'} of {layer.expert_channels[0].units}"
