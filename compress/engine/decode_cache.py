"""Decisions that are stored with a key/value cache: decode steps reuse the decisions of their prompt.

A decision belongs to the prompt that filled the cache. What is stored is plain data, so that it goes wherever the cache
goes: into a copy, a file, another process. It names the pruning that made it, and every other pruning refuses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

from ...registry import DataError, ModelError, Site, Strategy
from ...registry.tensors.caches import counts_positions, held, is_empty
from .site_cut import SiteCut

Kept = tuple[Tensor, "Tensor | None", "Tensor | None"]
"""Kept units (k,), or (B, k) where rows have their own; with a probe for compensation, its mean (C,) and the shares
(2,) of mean and slope."""

Seen = tuple[int, Tensor, dict[str, Any]]
"""A step's position, its residual stream before a site (B, 1, D), and what else its block was called with."""

MARK = "prunekit"
"""Attribute of a cache: the pruning that filled it, and by layer the prompt's length and the decisions; with policies
that decide again, the tokens since the last decision and the policy's memory. Also whether a call of it has failed."""

REMEDY = (
    "pass the whole prompt in one call with an empty cache (in generate(), without prefill_chunk_size and "
    "past_key_values), or choose the units once for all texts with pruned.freeze()"
)


MOVES = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices")
"""Methods of a cache that move its rows. Where each row has its own units, the cache refuses them."""


def rows_stay(*_: Any, **__: Any) -> NoReturn:
    """Raise the :class:`DataError` of :data:`MOVES`. As a function of a module it is copied and stored with a cache."""
    raise DataError(
        "the rows of this key/value cache have units of their own (group_by: row or cluster), so they cannot be "
        "reordered, repeated or selected; run the rows that you want as a prompt with an empty cache, or use group_by: "
        "batch"
    )


class Before(NamedTuple):
    """A cache before a call, to be put back if the call fails."""

    cache: Any
    mark: dict[str, Any] | None
    """A copy of what was stored with it."""
    length: int
    """Positions that it held of the layer that runs first; -1: it does not count them."""


class CacheDecisions:
    """Stores the decisions of one pruning on the cache object, so that generations may be interleaved."""

    def __init__(self, strategy: Strategy, cuts: Sequence[SiteCut], first: int):
        """``first`` is the index in a cache of the layer that runs first."""
        self.strategy, self.cuts, self.first = strategy, cuts, first
        self._pruning: str | None = None

    def before(self, cache: Any) -> Before:
        """A call begins with this cache: what :meth:`failed` needs.

        Raises :class:`DataError` for a cache that an earlier call has left half filled.
        """
        cache = own_cache(cache)
        mark = vars(cache).get(MARK)
        if mark is not None and "failed" in mark:
            if not is_empty(cache):
                raise DataError(
                    "an earlier call with this key/value cache has failed on its way through the layers, so some of "
                    "them hold its tokens and others do not; start the prompt with an empty cache, and to be able to "
                    "go on after a failure, call the model with a copy (copy.deepcopy) of the cache"
                )
            del vars(cache)[MARK]
            mark = None
        return Before(cache, None if mark is None else _copied(mark), self._length(cache))

    def failed(self, before: Before, refused: bool) -> None:
        """A call has failed. If no layer has stored its tokens, the earlier decisions come back.

        Otherwise the cache is refused until it is emptied. ``refused``: the call ended before any layer began.
        """
        cache = before.cache
        if not (refused or is_empty(cache) or 0 <= before.length == self._length(cache)):
            vars(cache)[MARK] = {"pruning": self.pruning, "layers": {}, "failed": True}
        elif before.mark is not None:
            vars(cache)[MARK] = before.mark
        else:
            vars(cache).pop(MARK, None)
            _let_rows_move(cache)

    def before_step(self, cache: Any, cached: int) -> Before:
        """Like :meth:`before`, for a step like the one before in a cache of so many positions: it decides nothing."""
        cache = own_cache(cache)
        return Before(cache, vars(cache)[MARK], cached)

    def _length(self, cache: Any) -> int:
        return int(cache.get_seq_length(self.first)) if counts_positions(cache, self.first) else -1

    def enter(self, cache: Any, layer: int, tokens: int, pruning: bool, decides: bool) -> int:
        """A layer begins with so many tokens; returns the positions that the cache already holds of it.

        ``layer`` is its index in the cache, ``decides`` whether its units depend on the prompt. Raises
        :class:`DataError` for a cache that was filled otherwise than the model runs now, and for a prompt in pieces.
        """
        cache = own_cache(cache)
        cached = held(cache, layer, tokens)
        if not cached:
            self._begin(cache, layer, tokens, pruning)
            return 0
        known, marked = self._layer(cache, layer), layer in vars(cache).get(MARK, {"layers": ()})["layers"]
        if (marked and not pruning) or (pruning and known is None):
            how = "with this pruning" if known is not None else f"with{' another' if marked else 'out this'} pruning"
            raise DataError(
                f"layer {layer}: the key/value cache already holds {cached} positions that were computed {how}, and "
                f"the model now runs {'with this' if pruning else 'without any'}; start the prompt with an empty cache"
            )
        if pruning and decides and known is not None:
            if cached < known["prompt"]:
                raise DataError(
                    f"layer {layer}: the key/value cache was cropped to {cached} positions, but its units were chosen "
                    f"from a prompt of {known['prompt']}; {REMEDY}"
                )
            if tokens > 1 and self.strategy.turns == "refuse":
                raise DataError(
                    f"layer {layer}: {tokens} tokens in one call continue a key/value cache of {cached} positions, "
                    f"whose units were chosen without them; set turns: keep or turns: decide, {REMEDY}"
                )
            if tokens > 1 and self.strategy.turns == "decide":
                known.clear()
                known["prompt"] = cached + tokens
        return cached

    def of(self, cache: Any, layer: int, site: Site) -> Kept | None:
        """What was decided for a site with this cache."""
        known = self._layer(own_cache(cache), layer)
        return None if known is None else known.get(site.kind)

    def remember(self, cache: Any, layer: int, site: Site, decided: Kept) -> None:
        """Keep a decision for the steps to come."""
        known = self._layer(own_cache(cache), layer)
        assert known is not None  # the layer has begun
        known[site.kind] = decided
        if decided[0].dim() == 2:
            vars(own_cache(cache)).update(dict.fromkeys(MOVES, rows_stay))

    def memory(self, cache: Any) -> dict[str, Any]:
        """What a policy remembers of a cache that this pruning fills."""
        return vars(own_cache(cache))[MARK].get("memory", {})

    def keep_memory(self, cache: Any, memory: dict[str, Any]) -> None:
        """Have :meth:`memory` return this."""
        vars(own_cache(cache))[MARK]["memory"] = memory

    def since(self, cache: Any, layer: int, site: Site) -> tuple[int, list[Seen]]:
        """Positions that the cache held when a site was decided last, and the tokens of the steps since."""
        known = self._layer(own_cache(cache), layer)
        assert known is not None  # the layer has begun
        return known.setdefault(f"since {site.kind}", (known["prompt"], []))

    def decided_at(self, cache: Any, layer: int, site: Site, position: int) -> None:
        """A site is decided again: with the token at this position (from 1) and for those after it."""
        known = self._layer(own_cache(cache), layer)
        assert known is not None  # the layer has begun
        known[f"since {site.kind}"] = position, []

    def _begin(self, cache: Any, layer: int, tokens: int, pruning: bool) -> None:
        """A prompt begins in an empty cache: what was decided for an earlier one is gone."""
        mark = vars(cache).get(MARK)
        _let_rows_move(cache)
        if pruning:
            if mark is None or mark["pruning"] != self.pruning:
                mark = vars(cache)[MARK] = {"pruning": self.pruning, "layers": {}}
            mark["layers"][layer] = {"prompt": tokens}
        elif mark is not None:
            mark["layers"].pop(layer, None)
            if not mark["layers"]:
                del vars(cache)[MARK]

    def _layer(self, cache: Any, layer: int) -> dict[str, Any] | None:
        """What this pruning has stored of a layer."""
        mark = vars(cache).get(MARK)
        return mark["layers"].get(layer) if mark is not None and mark["pruning"] == self.pruning else None

    @property
    def pruning(self) -> str:
        """Names the pruning, in every process alike: its options, sites and counts, and what was decided once."""
        if self._pruning is None:
            kind, options = self.strategy.identity
            parts = [f"{kind.__module__}.{kind.__qualname__}", options]
            for cut in self.cuts:
                fixed, mean = cut.fixed, cut.history.mean if cut.compensation.wanted else None
                parts.append(repr((cut.site, cut.count, None if fixed is None else fixed.tolist())))
                parts.append("" if mean is None else mean.cpu().numpy().tobytes().hex())
            self._pruning = sha256("\n".join(parts).encode()).hexdigest()
        return self._pruning


def _copied(mark: dict[str, Any]) -> dict[str, Any]:
    """What is stored with a cache, as it is now."""
    layers = {
        layer: {name: (of[0], list(of[1])) if name.startswith("since ") else of for name, of in known.items()}
        for layer, known in mark["layers"].items()
    }
    return mark | {"layers": layers}


def _let_rows_move(cache: Any) -> None:
    for name in MOVES:
        if vars(cache).get(name) is rows_stay:
            del vars(cache)[name]


def own_cache(cache: Any) -> Any:
    """The cache of the decoder's own tokens: in an encoder-decoder cache it is one of two."""
    return getattr(cache, "self_attention_cache", cache)


def cache_indices(model: nn.Module, layers: Sequence[nn.Module], sites: Sequence[Site]) -> list[int]:
    """Every layer's index in a cache: the ``layer_idx`` of its attention, or else of another module, or its place.

    They differ in a model whose layers were taken out or put in another order. Raises :class:`ModelError` for two
    layers with the same index.
    """
    found = list(range(len(layers)))
    for site in reversed(sites):  # an attention comes before the MLP of its layer
        modules = [*model.get_submodule(site.entry).modules(), *layers[site.layer].modules()]
        own = [number for module in modules if isinstance(number := getattr(module, "layer_idx", None), int)]
        found[site.layer] = own[0] if own else site.layer
    for place, index in enumerate(found):
        if index in found[:place]:
            entry = next((site.entry for site in sites if site.layer == place), f"layers[{place}]")
            raise ModelError(
                f"layers {found.index(index)} and {place} both have layer_idx {index}, so they would share one part of "
                f"a key/value cache; give every layer a number of its own, as in {entry}.layer_idx = {place}"
            )
    return found
