"""What a model takes in memory: its weights, what the pruning holds, and the peaks of a prefill and of decoding."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ..registry import Evaluator, Measurement, Subject, TextSource, hookimpl
from .allocations import meter, peak_bytes, weight_bytes
from .inputs import batch_text, one_batch, setting
from .passes import cached_prefill, decode_step, prefill, prompt_length, settle
from .timing import machine


class Memory(Evaluator):
    """Bytes of weights, statistics and gathered copies, and the peaks of a prefill and of decoding, beside dense.

    ``weights`` are the model's parameters and buffers: all of them, since the weights that are cut stay to be
    put back. ``statistics`` are the channel histories with the copies that :attr:`Subject.reset` restores, and what
    compensation holds: a covariance or its pivot where cuts are made per batch, else the slope. ``gathered`` are the
    copies of kept weights that are there between passes, the largest seen: a cut that is made once keeps them, one
    that is made per batch lets each go in a pass without a cache, and keeps them while it decodes.

    ``prefill_peak`` and ``decode_peak`` are the most bytes allocated at once beyond weights and statistics:
    activations, logits, key/value cache, probe, what solving for a batch takes, and gathered copies, whether they
    were made before or meanwhile. So ``weights + statistics + prefill_peak`` is what a prefill takes in all, and
    ``gathered`` is no further summand. The prefill computes logits at every position and keeps no cache; the decode
    peak begins with the first step, when the prefill's cache is there and its logits have gone.

    Allocations by torch are seen, not memory that a library takes past it. One evaluator measures one shape.
    """

    paired: ClassVar[bool] = True

    name: Literal["memory"] = "memory"
    batch_size: int = Field(default=20, ge=1, description="sequences of the batch")
    length: int = Field(default=256, ge=1, description="tokens of each sequence's prefill, at most the model's context")
    decode_steps: int = Field(
        default=16, ge=0, description="tokens for each sequence after the prefill; 0: prefill only"
    )
    text: TextSource | None = Field(default=None, description="take the tokens from here; null: random ones")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of the random tokens")

    def check(self, model: Any) -> None:
        """Raise SpecError where prefill and decode steps do not fit in the model's context."""
        prompt_length(self.name, model, self.length, self.decode_steps)

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (context too short, a device without statistics) and DataError (short text)."""
        length = prompt_length(self.name, subject.model, self.length, self.decode_steps)
        ids = one_batch(subject, self.text, self.batch_size, length + self.decode_steps, self.seed)
        values: dict[str, int | float | None] = {}
        modes = (("", nullcontext), ("dense_", subject.dense))
        for prefix, mode in subject.progress(iter(modes), self.name, len(modes)):
            with mode():
                found = self._bytes(subject, ids, length)
            if prefix:
                found["statistics"] = 0  # they are there, but a model that was never pruned has none
            values |= {f"{prefix}{key}": value for key, value in found.items()}
        protocol = {
            "weights": "bytes of parameters and buffers, those cut included, those offloaded to disk not",
            "statistics": "bytes of channel histories, of the copies they are put back from, and of what "
            "compensation holds",
            "gathered": "most bytes of copied weights that are there between passes; the peaks include them",
            "prefill_peak": "most bytes at once beyond weights and statistics; logits at every position, no cache",
            "decode_peak": "the same during the decode steps, key/value cache included" if self.decode_steps else None,
            "meter": meter(subject.model),
            "order": "pruned, dense",
            "text": batch_text(self.text, self.seed),
            "batch_size": self.batch_size,
            "length": length,
            "decode_steps": self.decode_steps,
            **setting(subject.model),
            **machine(subject.model),
        }
        return Measurement(values, protocol)

    def _bytes(self, subject: Subject, ids: Tensor, length: int) -> dict[str, int]:
        """The values of the mode that the model runs in; ids (B, length + decode steps)."""
        model, prompt = subject.model, ids[:, :length]

        def decode(cache: Any) -> None:
            for token in ids[:, length:].split(1, 1):
                decode_step(model, token, cache)

        peaks = {"prefill_peak": (lambda: None, lambda _: prefill(model, prompt))}
        if self.decode_steps:
            peaks["decode_peak"] = (lambda: cached_prefill(model, prompt), decode)
        found, held = {"weights": weight_bytes(model)}, []
        for key, (prepare, run) in peaks.items():
            settle(model, ids)
            held.append(subject.held_bytes())
            found[key] = held[-1].get("gathered", 0) + peak_bytes(model, prepare, run)
            held.append(subject.held_bytes())
        return {**found, **{key: max(each.get(key, 0) for each in held) for key in ("statistics", "gathered")}}


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Memory]
