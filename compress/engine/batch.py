"""What holds for one batch alone, from the call of the decoder to its end, with or without an error.

Letters: B rows of the batch, T its positions, D hidden size, C channels; b, t: the probe's rows and positions; R rows
of a producer, r those kept; k kept units, c their channels.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...registry import DataError, NonFiniteError, Site, complement
from ...registry.errors import FINITE_REMEDY

Mode = Literal["dense", "calibrate", "prune"]

REUSED_UP_TO = 2048
"""Largest batch, in tokens, that reuses the probe's products: in a larger one copying them takes the time it saves."""


class Decision(NamedTuple):
    """Kept units (k,), and the probe's rows (b,) and positions (t,) or (b, t); all int64 ascending.

    Where rows keep different units, (B, k); rows and positions are then those of the first group.
    """

    kept: Tensor
    rows: Tensor
    positions: Tensor
    probe_mean: Tensor | None = None
    """(C,) float32: the channels' mean in the probe, where compensation uses it."""
    shares: Tensor | None = None
    """(2,) float32: the shares of mean and slope that fit the probe best, where compensation checks them."""
    groups: tuple[tuple[Tensor, Any], ...] = ()
    """The rows of every group of the batch, int64 ascending, and its own decision; empty: there is one for all."""


@dataclass(eq=False)
class ProbeProducts:
    """What a site's producers computed for the probe's tokens; a small batch reuses it.

    A producer computes every token alone, so its output for a token is the same in the probe and in the batch.
    """

    hidden: Tensor
    """(B, T, D): the batch that the probe was taken from."""
    rows: Tensor
    """(b,) int64 ascending."""
    positions: Tensor
    """(t,) int64 ascending."""
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    """(b, t, R) by producer."""

    def linear(self, producer: nn.Module, weight: Tensor, bias: Tensor | None, kept: Tensor) -> Tensor:
        """The producer's kept rows of the whole batch: weight (r, D), bias (r,), kept (r,) -> (B, T, r)."""
        order, others = self.split
        probed = self.outputs[producer].flatten(0, -2).index_select(1, kept)
        made = torch.cat([probed, functional.linear(others, weight, bias)]).index_select(0, order)
        return made.view(*self.hidden.shape[:2], len(kept))

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """The place of every token of the batch among those of the probe followed by the others, (B * T,) int64, and
        the others' states (o, D)."""
        tokens = (self.rows[:, None] * self.hidden.shape[1] + self.positions).view(-1)
        states = self.hidden.view(-1, self.hidden.shape[-1])
        others = complement(tokens, len(states))
        return torch.cat([tokens, others]).argsort(), states.index_select(0, others)


@dataclass(eq=False)
class ProbeRun:
    """A site's run on a probe: its producers compute all rows, and what reaches its consumer is kept."""

    valid: Tensor | None
    """(b, t) bool: the probe's real tokens; None where all are."""
    products: ProbeProducts | None
    """What the producers computed, where the batch can reuse it."""
    is_running: bool = True
    states: Tensor | None = None
    """(b, t, C) or (b * t, C): what has reached the consumer."""
    read: set[nn.Module] = field(default_factory=set)
    """The site's linear layers that it has called."""


def worth_reusing(hidden: Tensor) -> bool:
    """Whether a batch (B, T, D) is faster with :class:`ProbeProducts` (docs/benchmarks/speed.md)."""
    small = hidden.shape[0] * hidden.shape[1] <= REUSED_UP_TO
    plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    return small and plain and hidden.is_contiguous() and (hidden.device.type, hidden.dtype) == ("cpu", torch.float32)


Observe = Callable[[Any, Tensor], None]
"""Takes a site of the engine and what enters its consumer, (B, T, c) or (B * T, c)."""


@dataclass(eq=False)
class SiteBatch:
    """What holds for one site in one batch; the hooks write it."""

    residual: Tensor | None = None
    """(B, T, D): input of the site's norm, from the norm's call until the site is entered."""
    decision: Decision | None = None
    """Made when the site is entered, or ahead of it."""
    selected: tuple[Any, tuple[Tensor, Tensor] | None] | None = None
    """In a prompt with all units: what the site was entered with, and the rows (b,) and positions (t,) or (b, t) of the
    tokens that choose units once they reach its consumer; None: every group of rows selects its own then."""
    entered: bool = False
    """Whether its layer was called."""
    read: set[nn.Module] = field(default_factory=set)
    """The site's linear layers that were called; probes do not count."""
    learnt: tuple[Tensor, Tensor] | None = None
    """Columns (c,) and what history becomes there (T, c), once the batch has passed."""
    tokens: Tensor | None = None
    """(n,) int64: the tokens, of B * T, that enter a routed expert; None where all do."""
    weights: Tensor | None = None
    """(n,) float32: the router's weights of these tokens, where statistics are weighted by them."""


class Batch:
    """One call of the decoder. The hooks write it, and the probing what concerns the probe; everybody else reads."""

    def __init__(
        self,
        mode: Mode,
        shape: tuple[int, int],
        valid: Tensor | None,
        sites: int,
        observe: Observe | None = None,
        steady: bool = False,
    ):
        self.mode, self.shape, self.observe = mode, shape, observe
        self.steady = steady
        """Whether it is a decode step like the one before, in which no hook has anything to do (:mod:`.steady`)."""
        self.valid = valid
        """(B, T) bool: real tokens; None where all are."""
        self.sites = [SiteBatch() for _ in range(sites)]
        """By the sites' numbers."""
        self.cache: Any = None
        """The key/value cache of the layer that runs; None without one."""
        self.before: Any = None
        """The cache as it was before the call (:class:`~.decode_cache.Before`); None without one."""
        self.layer = 0
        """The index of that layer in the cache."""
        self.cached = 0
        """Positions that the cache already holds of that layer; more than 0 in the decode steps of a generation."""
        self.is_turn = False
        """Whether its tokens follow others in the cache, and choose units like a prompt."""
        self.probe: ProbeRun | None = None
        """The last probe."""
        self.records: list[dict[str, Any]] = []
        """What the trace gets of it, once the batch has passed."""
        self.generator: torch.Generator | None = None
        """What random components draw from; later batches continue from it, once this one has passed."""
        self.output: Tensor | None = None
        """(D,) float32: mean output of the last attention, for a policy that watches it."""
        self.attention_arguments: dict[str, Any] = {}
        """What the last attention was called with, for a probe that runs ahead of its block."""
        self.checks = FiniteChecks()
        self.passed = False
        """Whether the call has ended. Gradient checkpointing may run its layers again, with the same decisions."""

    def close(self) -> None:
        """The call has ended: only the decisions stay."""
        self.passed = True
        self.observe = self.probe = None
        self.before, self.attention_arguments, self.checks = None, {}, FiniteChecks()

    def seen(self, number: int, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What enters a site's consumer, and its real tokens: (B, T, c) and (B, T) bool, or None where all are real.

        Of a routed expert it is (n, 1, c), for its n real tokens: as a batch of n rows with one position. Of whole
        experts it is (n, 2, E) as it is.
        """
        at_site, valid = self.sites[number], self.valid_on(x.device)
        if at_site.tokens is None:
            return x.reshape(*self.shape, x.shape[-1]), valid
        if at_site.weights is not None:
            x = x.float() * at_site.weights[:, None]
        real = x if valid is None else x[valid.reshape(-1)[at_site.tokens]]
        return real[:, None] if real.dim() == 2 else real, None

    def valid_on(self, device: torch.device) -> Tensor | None:
        """The batch's real tokens on the device where a layer computes: the batch may come from another one."""
        if self.valid is not None and self.valid.device != device:
            self.valid = self.valid.to(device)
        return self.valid


class OneAtATime:
    """A reentrant lock, which a copy of the model does not share."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple:
        return OneAtATime, ()


_asked: ContextVar[Mapping[Running, Mode]] = ContextVar("_asked", default={})  # noqa: B039 - never written to
"""The modes that this thread has asked for. A copy of a model has none."""


class Running:
    """What a pruned model is doing now."""

    def __init__(self) -> None:
        self.usual: Mode = "dense"
        """The mode of threads that have asked for no other one."""
        self.applied: Mode = "dense"
        """The mode that the modules are in: cuts made once are open in ``prune``."""
        self.batch: Batch | None = None
        """The batch that runs now."""
        self.one_at_a_time = OneAtATime()
        """Held while a batch runs: modules are cut for one batch at a time, also with several threads."""

    @property
    def mode(self) -> Mode:
        """The mode of this thread's, or asyncio task's, next batch."""
        if torch.compiler.is_compiling():
            return self.applied
        return _asked.get().get(self, self.usual)

    def ask(self, mode: Mode | None) -> Mode | None:
        """Set this thread's mode, None for the usual one; returns what was set before."""
        asked = dict(_asked.get())
        previous = asked.pop(self, None)
        _asked.set(asked if mode is None else {**asked, self: mode})
        return previous

    def enter(self, batch: Batch | None) -> Batch | None:
        """Make ``batch`` the one that runs now; returns the previous one."""
        outer, self.batch = self.batch, batch
        return outer


# Whether the scores, means and histories of a batch are finite. This is checked once, when the batch has passed: an
# accelerator has to wait for every value that is read, and there are several at every site.

SCORES = (
    "the scores of {consumer} are NaN or infinite, so nothing can be decided; the activations here, or the weights "
    "before, are not finite."
)
LEARNT = "NaN or infinity in what entered {consumer} in this batch; the history is not changed."
PROBED = "NaN or infinity in what entered {consumer} in the probe of this batch."


class FiniteChecks:
    """Tensors of sites to be checked, with the message for each."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, str, Site]] = []

    def add(self, tensor: Tensor, message: str, site: Site) -> None:
        """Check ``tensor`` at :meth:`run`."""
        self._waiting.append((tensor.sum(), tensor, message, site))

    def run(self) -> None:
        """Raise :class:`NonFiniteError` for the first tensor with NaN or infinity.

        Does nothing while the caller compiles the whole decoder.
        """
        if not self._waiting or torch.compiler.is_compiling():
            return
        sums = [total for total, *_ in self._waiting]
        if len({total.device for total in sums}) > 1:
            sums = [total.cpu() for total in sums]
        finite = torch.stack([total.float() for total in sums]).isfinite().cpu()
        if bool(finite.all()):
            return
        for (_, tensor, message, site), fine in zip(self._waiting, finite.tolist(), strict=True):
            if not fine and not bool(torch.isfinite(tensor).all()):  # a sum may overflow where no number does
                raise not_finite(message, site)


def not_finite(message: str, site: Site) -> NonFiniteError:
    """The error for a site."""
    return NonFiniteError(f"{site.label}: {message.format(consumer=site.consumer)} {FINITE_REMEDY}")


# The arguments of a call.

_PARAMETERS: dict[type[nn.Module], tuple[str, ...]] = {}


def learn_parameters(modules: Sequence[nn.Module]) -> None:
    """Look up the parameters of the modules' forwards beforehand, so that :func:`named` can be compiled."""
    for module in modules:
        kind: Any = type(module)
        if kind not in _PARAMETERS:
            _PARAMETERS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]


def named(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, those given by position too; :func:`learn_parameters` has seen the module."""
    return {**dict(zip(_PARAMETERS[type(module)], args, strict=False)), **kwargs} if args else kwargs


def split(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What a block reads, its first parameter, and its other arguments by name."""
    arguments = dict(named(module, args, kwargs))
    return arguments.pop(_PARAMETERS[type(module)][0]), arguments


def stream_before(site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The residual stream before a site; ``module``, which is called, is its norm, or its entry where it has none."""
    return args[0] if site.norm else split(module, args, kwargs)[0]


def valid_tokens(attention_mask: Any, batch: int, length: int) -> Tensor | None:
    """Which tokens of the batch are real, (B, T) bool; None where all are.

    The mask is (B, T), or longer by what a cache holds. With a static cache it is already (B, 1, T, keys), or one such
    for each kind of attention: a token is real where it may attend to itself.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if attention_mask is None:
        return None
    is_tensor = isinstance(attention_mask, Tensor)
    fits = is_tensor and attention_mask.dim() in (2, 4) and len(attention_mask) in (1, batch)
    if not fits or attention_mask.shape[-1] < length:
        found = tuple(attention_mask.shape) if is_tensor else type(attention_mask).__name__
        raise DataError(
            f"attention_mask: expected a tensor (B, {length}), or (B, 1, {length}, keys), found {found}; only these "
            "tell which tokens are real"
        )
    if attention_mask.dim() == 4:
        own = attention_mask[:, 0, :, :length].diagonal(dim1=1, dim2=2)
        valid = own if own.dtype == torch.bool else own == 0
    else:
        valid = attention_mask[:, -length:].bool()
    if bool(valid.all()):
        return None
    return valid.expand(batch, length)
