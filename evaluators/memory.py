"""Memory of a model: its weights, what the pruning holds, and the peaks of a prefill and of decoding."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

from torch import Tensor

from ..registry import Evaluator, Measurement, Subject, hookimpl
from .allocations import meter, peak_bytes, weight_bytes
from .passes import Decoding, cached_prefill, decode_step, prefill, setting, short_pass
from .timing import machine


class Memory(Decoding):
    """Bytes of weights, statistics and gathered copies, and the peaks of a prefill and of decoding; dense ones too.

    ``weights`` are all of the model's parameters and buffers, because the weights that are cut stay in memory.
    ``statistics`` are the channel histories, the copies that :attr:`Subject.reset` restores, and what compensation
    holds: a covariance or its pivot for cuts per batch, else the slope. ``gathered`` are the copies of kept weights
    that exist between passes, the largest found. A static cut keeps them. A cut per batch frees each of them in a pass
    without a cache, and keeps them while it decodes.

    ``prefill_peak`` and ``decode_peak`` are the most bytes allocated at once, without weights and statistics:
    activations, logits, key/value cache, probe, solving for a batch, and gathered copies, made before or during the
    pass. So a prefill takes ``weights + statistics + prefill_peak``, in which ``gathered`` is contained. The prefill
    computes logits at every position and keeps no cache. The decode peak starts with the first step, when the prefill's
    cache exists and its logits are freed.

    Only allocations by torch are counted. One evaluator measures one shape.
    """

    paired: ClassVar[bool] = True

    name: Literal["memory"] = "memory"

    def evaluate(self, subject: Subject) -> Measurement:
        """Measure; raises SpecError (context too short, a device without statistics) and DataError (short text)."""
        length = self.prompt_length(subject.model)
        ids = self.batch(subject, length + self.decode_steps)
        values: dict[str, int | float | None] = {}
        modes = (("", nullcontext), ("dense_", subject.dense))
        for prefix, mode in subject.progress(modes, self.name, len(modes)):
            with mode():
                found = self._bytes(subject, ids, length)
            if prefix:
                found["statistics"] = 0  # they exist, but a model that was never pruned has none
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
            **self.about_batch(length),
            "decode_steps": self.decode_steps,
            **setting(subject.model),
            **machine(subject.model),
        }
        return Measurement(values, protocol)

    def _bytes(self, subject: Subject, ids: Tensor, length: int) -> dict[str, int]:
        """The values of the current mode, pruned or dense; ids (B, length + decode steps)."""
        model, prompt = subject.model, ids[:, :length]

        def decode(cache: Any) -> None:
            for token in ids[:, length:].split(1, 1):
                decode_step(model, token, cache)

        peaks: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
            "prefill_peak": (lambda: None, lambda _: prefill(model, prompt))
        }
        if self.decode_steps:
            peaks["decode_peak"] = (lambda: cached_prefill(model, prompt), decode)
        found, held = {"weights": weight_bytes(model)}, []
        for key, (prepare, run) in peaks.items():
            short_pass(model, ids)
            held.append(subject.held_bytes())
            found[key] = held[-1].get("gathered", 0) + peak_bytes(model, prepare, run)
            held.append(subject.held_bytes())
        return {**found, **{key: max(each.get(key, 0) for each in held) for key in ("statistics", "gathered")}}


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Memory]
