"""What compensation is compared with: the contender without any that people know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..files.dotted import resolved_settings
from .columns import Column
from .configurations import Configuration
from .contest import ordered

WITHOUT = "none"
"""The compensator that gives nothing back, which is also what pipelines older than compensation have."""


def baseline(column: Column, contenders: Sequence[Configuration]) -> Configuration | None:
    """Of contenders that compensate differently: PP without compensation, else the best without.

    PP is what probes; of several the first planned. None where all compensate, none does, or nothing is known.
    """
    settings = [(one, resolved_settings(one.first.resolved)) for one in contenders]
    plain = [(one, known) for one, known in settings if _compensator(known) == WITHOUT]
    if not plain or len(plain) == len(settings):
        return None
    probing = [one for one, known in plain if one.strategy == "pp" and _probes(known)]
    return probing[0] if probing else ordered(column, [one for one, _ in plain])[0]


def _compensator(settings: dict[str, Any]) -> str:
    return str(settings.get("prune.compensate.name", settings.get("prune.compensate")) or WITHOUT)


def _probes(settings: dict[str, Any]) -> bool:
    """Whether it has a selector of what to probe, as pipelines have that say nothing of one."""
    return "prune.selector" not in settings or settings["prune.selector"] is not None
