"""The options of recovery: the section ``recover`` of a pipeline file, and those of ``prunekit recover``."""

from __future__ import annotations

import importlib.util

from pydantic import Field

from ...registry import SpecError, Strategy, TextSource


class Recover(TextSource):
    """LoRA after the cut, and the text that it is trained on: that of the calibration where none is named.

    A step takes ``batch_size`` x ``accumulate`` sequences. Rank, alpha, dropout and learning rate are LLM-Pruner's
    (NeurIPS 2023, arXiv 2305.11627).
    """

    steps: int = Field(default=200, ge=1, description="optimizer steps")
    batch_size: int = Field(default=8, ge=1, description="sequences in a batch")
    accumulate: int = Field(default=1, ge=1, description="batches in one optimizer step")
    length: int = Field(default=256, ge=2, description="tokens of a sequence")
    sequences: int | None = Field(
        default=None, ge=1, description="sequences to train on; null: as many as the steps can use"
    )
    rank: int = Field(default=8, ge=1, description="rank of the low-rank updates")
    alpha: float = Field(default=16.0, ge=0, allow_inf_nan=False, description="the updates are scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, le=1, description="dropout on the input of the updates")
    learning_rate: float = Field(
        default=1e-4, ge=0, allow_inf_nan=False, description="learning rate after a short warm-up"
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of updates, sequences, order and dropout")

    def check_place(self) -> None:
        """Raise :class:`ValueError` for several places, and for options of a text where there is no place."""
        if self._is_named:
            super().check_place()
            return
        of_text = [key for key in TextSource.model_fields if key in self.model_fields_set - set(self.places)]
        given = [key for key in of_text if getattr(self, key) != TextSource.model_fields[key].default]
        if given:
            raise ValueError(f"{given[0]} is of a text, and none is named; name one, or leave {given[0]} out")

    def check(self, strategy: Strategy, generated: bool) -> None:
        """Raise :class:`ValueError` for a strategy whose cut is not a model of its own, or where there is no text.

        ``generated``: whether the model generates calibration text itself.
        """
        if strategy.dynamic:
            raise ValueError(
                f"strategy {strategy.name} decides per batch, and what is trained has one cut; leave recover out, use "
                "a strategy that decides once, or freeze the decisions (prunekit export --freeze mean-score --profile "
                "hf-hetero) and train the folder (prunekit recover)"
            )
        if not strategy.applier.resizes:
            raise ValueError(
                f"applier {strategy.applier.name} computes all units, and training would fill in the dropped ones; use "
                "applier slice, or leave recover out"
            )
        if generated and not self._is_named:
            raise ValueError("the calibration text is generated, and training reads one; name a text in recover")

    @property
    def text(self) -> TextSource | None:
        """The text alone; None where none is named."""
        if not self._is_named:
            return None
        return TextSource(**{key: getattr(self, key) for key in TextSource.model_fields})

    @property
    def _is_named(self) -> bool:
        return any(getattr(self, key) is not None for key in self.places)

    @property
    def taken(self) -> int:
        """Number of sequences that all steps take together."""
        return self.steps * self.batch_size * self.accumulate

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises: 100 as in LLM-Pruner, fewer in a short run."""
        return min(100, self.steps // 10)

    @property
    def plan(self) -> str:
        """What is to be done, for people."""
        count = self.batch_size * self.accumulate
        return f"training: {self.steps} step{'s' * (self.steps != 1)} of {count} sequence{'s' * (count != 1)}"


def check_installed() -> None:
    """Raise :class:`SpecError` if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise SpecError("recover: it trains with peft, which is not installed: pip install peft")
