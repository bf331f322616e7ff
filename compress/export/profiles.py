"""The formats that can be written, what each requires of the cut, and where it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ...registry import Catalog, ExportFormat, PluginError, SpecError, Strategy, near
from ...registry.catalog import named
from ...registry.roles.exporting import MADE_FROM
from ..files.reader import by_name
from ..pruning.freezing import MEANINGS, check_freeze
from .constraint import Constraint

Checked = Literal["verified", "read", "no"]
"""``verified``: prunekit's tests run it; ``read``: its documentation or code says so; ``no``: it cannot run it."""

TOOLS = ("transformers", "vLLM", "SGLang", "llama.cpp")


@dataclass(frozen=True)
class Profile:
    """A format for pruned models."""

    name: str
    writes: str
    requires: str
    """Requirements on the cut."""
    runs: tuple[Checked, ...]
    """Whether it runs in each of :data:`TOOLS`."""
    remark: str
    needs_one_cut: bool = True
    """Whether one cut must serve all batches."""
    takes_multiple: bool = True
    equal: bool = False
    multiple: int = 1

    def constraint(self, multiple: int | None) -> Constraint:
        """The format's constraint on the counts; ``multiple`` is the user's option. Raises :class:`SpecError`."""
        if multiple is None:
            return Constraint(self.equal, self.multiple)
        if not self.takes_multiple:
            raise SpecError(f"--multiple: profile {self.name} keeps all widths as they are; leave --multiple out")
        if multiple < 1 or multiple % self.multiple:
            raise SpecError(
                f"--multiple: profile {self.name} takes multiples of {self.multiple}, found {multiple}; "
                f"nearest: {max(1, round(multiple / self.multiple)) * self.multiple}"
            )
        return Constraint(self.equal, multiple)


PROFILES = (
    Profile(
        "hf-uniform",
        "a stock transformers class, plain configuration",
        "equal counts in every layer; widths a multiple of --multiple",
        ("verified", "read", "read", "read"),
        "the widest choice of tools; llama.cpp by its own converter",
        equal=True,
    ),
    Profile(
        "hf-hetero",
        "every layer its own shape, in transformers' own format",
        "nothing",
        ("verified", "read", "no", "no"),
        "with its own code in the folder, or with prunekit; vLLM 0.33 with prunekit's plugin",
    ),
    Profile(
        "gguf",
        "a GGUF of architecture deci, every layer its own shape",
        "widths a multiple of 32 (256 for k-quants: --multiple 256)",
        ("no", "no", "no", "verified"),
        "an unmodified llama.cpp; Llama, Mistral and Qwen2",
        multiple=32,
    ),
    Profile(
        "padded",
        "the original class and shapes, dropped units zero",
        "nothing",
        ("verified", "read", "read", "read"),
        "saves nothing: neither memory nor time",
        takes_multiple=False,
    ),
    Profile(
        "dynamic",
        "strategy, statistics and recipe; the dense weights by reference",
        "nothing",
        ("verified", "no", "no", "no"),
        "loaded by prunekit; decides per batch as before",
        needs_one_cut=False,
        takes_multiple=False,
    ),
)


def profile_named(name: str, formats: Sequence[str] = ()) -> Profile:
    """The profile of that name; raises :class:`SpecError` naming the nearest name, one of plugins' ``formats`` too."""
    for profile in PROFILES:
        if profile.name == name:
            return profile
    names = [*(profile.name for profile in PROFILES), *formats]
    raise SpecError(f"--profile: there is no profile {name!r}{near(name, names)}; there are {', '.join(names)}")


def asked_for(name: str, catalog: Catalog) -> tuple[Profile, ExportFormat | None]:
    """The profile of that name; or the format of a plugin, and the profile that it is made from.

    Raises :class:`SpecError` for none, and for a format that has the name of a profile or an option without a default,
    :class:`PluginError` for one that is made from no profile.
    """
    formats = catalog.names("export_formats")
    if name not in formats:
        return profile_named(name, formats), None
    if any(profile.name == name for profile in PROFILES):
        raise SpecError(
            f"--profile: {name} is a profile of prunekit, and a plugin has an export format of that name; rename that "
            "format, or switch the plugin off with PRUNEKIT_BLOCK"
        )
    remedy = "a format is named without options, so give it a default in the plugin"
    found = by_name(catalog, "export_formats", name, remedy)
    assert isinstance(found, ExportFormat)
    if found.made_from not in MADE_FROM:
        raise PluginError(
            f"{named(found)}: made_from is {found.made_from!r}, not {' or '.join(MADE_FROM)}; fix the plugin"
        )
    return replace(profile_named(found.made_from), multiple=found.multiple), found


def check_freezing(profile: Profile, strategy: Strategy, freeze: str | None) -> None:
    """Raise :class:`SpecError` if a strategy must be frozen for a profile and is not, or the other way round."""
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
