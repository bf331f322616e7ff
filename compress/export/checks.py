"""What an export is refused for before anything is loaded."""

from __future__ import annotations

from ...registry import SpecError, Strategy
from ..freezing import MEANINGS, check_freeze
from .constraint import Constraint
from .profiles import Profile


def constraint_of(profile: Profile, multiple: int | None) -> Constraint:
    """What the counts must meet; raises :class:`SpecError` for a multiple that the profile cannot have."""
    if multiple is not None and profile.name in ("padded", "dynamic"):
        raise SpecError(f"--multiple: profile {profile.name} keeps all widths as they are; leave --multiple out")
    return profile.constraint(multiple)


def check_freezing(profile: Profile, strategy: Strategy, freeze: str | None) -> None:
    """Raise :class:`SpecError` where a strategy has to be frozen and is not, or the other way round."""
    probes = strategy.probes_with is not None
    if freeze is None:
        if probes and profile.needs_one_cut:
            ways = "; ".join(f"{how}: {meaning}" for how, meaning in MEANINGS.items())
            raise SpecError(
                f"strategy {strategy.name} looks at every batch, and profile {profile.name} holds one cut for all; add "
                f"--freeze ({ways}), or choose --profile dynamic"
            )
        return
    check_freeze(freeze)
    if not profile.needs_one_cut:
        raise SpecError("--freeze: profile dynamic goes on deciding per batch; leave --freeze out")
    if not probes:
        raise SpecError(f"--freeze: strategy {strategy.name} decides once anyway; leave --freeze out")
