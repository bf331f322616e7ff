"""Whether a strategy has to be frozen for a profile, said before anything is loaded."""

from __future__ import annotations

from ...registry import SpecError, Strategy
from ..pruning.freezing import MEANINGS, check_freeze
from .profiles import Profile


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
