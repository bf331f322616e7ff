"""What can be written, what each form asks of the cut, and where it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...registry import SpecError, near
from .constraint import Constraint

Checked = Literal["verified", "read", "no"]
"""``verified``: run with it when prunekit is tested; ``read``: its documentation or code says so; ``no``: it cannot."""

TOOLS = ("transformers", "vLLM", "SGLang", "llama.cpp")


@dataclass(frozen=True)
class Profile:
    """One form that a pruned model can be written in."""

    name: str
    writes: str
    asks: str
    """Of the cut, before it is made."""
    runs: tuple[Checked, ...]
    """In each of :data:`TOOLS`."""
    remark: str
    needs_one_cut: bool = True
    """Whether the cut must be made once and for all."""
    takes_multiple: bool = True
    equal: bool = False
    multiple: int = 1

    def constraint(self, multiple: int | None) -> Constraint:
        """What the form asks of the counts, ``multiple`` being the user's wish; raises :class:`SpecError`."""
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
        "with its own code beside it, or by prunekit; vLLM 0.33 by prunekit's plugin",
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


def profile_named(name: str) -> Profile:
    """The profile of that name; raises :class:`SpecError` naming the near one."""
    names = [profile.name for profile in PROFILES]
    for profile in PROFILES:
        if profile.name == name:
            return profile
    raise SpecError(f"--profile: there is no profile {name!r}{near(name, names)}; there are {', '.join(names)}")
