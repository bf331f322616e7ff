"""Options and names of version 0.1 that have moved: their old defaults are still read, other values are refused."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

PP = "write use: pp_reference (or pp_reference_wanda_sp, pp_reference_flap)"

OPTIONS: dict[tuple[str, str], tuple[Any, str]] = {
    ("strategies", "rescale"): ("exact", f"{PP}, which has rescale: two_decimals and rescale: off"),
    ("strategies", "probe_mask"): (
        "selected",
        "write use: pp_reference, whose probe has the first positions' mask",
    ),
    ("strategies", "pad_handling"): ("exclude", "write use: pp_reference, which treats padding as PP's code does"),
    ("scorers", "recurrence"): (
        "published",
        "write scorer: flap_reference for flap_shipped, and scorer: pp_reference_flap for pp_shipped",
    ),
    ("scorers", "square_attention"): (False, "write scorer: wifn"),
    ("history_mergers", "as_shipped"): (False, "write merger: {name: pp_reference_fixed_ratio, probe: SHARE}"),
}
"""By role and option: the default that it had, and what to write instead of any other value."""

PLACES: dict[str, tuple[str, ...]] = {
    "strategies": ("prune",),
    "scorers": ("prune", "scorer"),
    "history_mergers": ("prune", "merger"),
}
"""By role, where its options are in a pipeline."""

NAMES = {
    ("allocators", "flap_shipped"): "flap_reference",
    ("allocators", "pp_flap_shipped"): "pp_reference_flap",
}
"""By role and name: the name now."""


def without_moved(pipeline: dict[str, Any]) -> dict[str, Any]:
    """A resolved pipeline without the options that have moved, if they have their old defaults."""
    found = deepcopy(pipeline)
    for (role, option), (default, _) in OPTIONS.items():
        section: Any = found
        for key in PLACES[role]:
            section = section.get(key) if isinstance(section, dict) else None
        if isinstance(section, dict) and option in section and section[option] == default:
            del section[option]
    return found
