"""The policy's role: when a strategy that decides per batch decides while a model generates.

A *prompt* is a call of the model with an empty key/value cache, or without one. A *step* is a call with one more token.
Letters: D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..component import Component


class Policy(Component):
    """Says which calls of a generation are pruned, and when units are chosen again.

    The prompt always chooses units. They are stored with the key/value cache, and so is the policy's memory.
    """

    watches: ClassVar[bool] = False
    """Whether :meth:`watch` gets the output of the last attention after every call."""

    @property
    def prunes_prompt(self) -> bool:
        """Whether the prompt runs pruned; if not, it runs with all units, and its decision takes effect after it."""
        return True

    @property
    def prunes_steps(self) -> bool:
        """Whether steps run pruned; if not, they run with all units."""
        return True

    @property
    def reads(self) -> int:
        """Most tokens of steps that a further decision reads; 0: the prompt's decision stays."""
        return 0

    def again(self, since: int, memory: Mapping[str, Any]) -> bool:
        """Whether a step chooses units again, from its own token and those before it.

        ``since`` counts the tokens since the last decision, this one included. It is asked at every site of a step, and
        must answer the same.
        """
        return False

    def watch(self, memory: Mapping[str, Any], output: Tensor, decided: bool) -> dict[str, Any]:
        """The new memory after a call: numbers, tensors, and lists of them; it is empty before a prompt.

        output (D,) float32: mean over the call's real tokens of what the last attention adds to the residual stream;
        ``decided``: whether this call chose units.
        """
        return {}

    @property
    def is_plain(self) -> bool:
        """Whether prompt and steps are pruned by the prompt's decision."""
        return self.prunes_prompt and self.prunes_steps and not self.reads


class PerPrompt(Policy):
    """The prompt chooses units for itself and for its decode steps."""

    name: Literal["per_prompt"] = "per_prompt"
