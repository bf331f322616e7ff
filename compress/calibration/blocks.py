"""Statistics of blocks on the dense model, for allocators: what enters and leaves every site's block and every layer.

Letters: B rows, T positions, D hidden size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...registry import BlockStatistic, NonFiniteError, Site, SiteKind
from ...registry.errors import FINITE_REMEDY
from ..engine.batch import split, stream_before
from ..engine.engine import Engine
from .passes import Batch, Progress, run_batch

Block = tuple[int, "SiteKind | None"]
"""A site's block by its layer and kind; a whole layer by its number and None."""

See = Callable[[Block, Tensor, Tensor], None]
"""Gets the residual stream that enters a block and the one that leaves it, both with D as their last dimension."""


def describe_blocks(
    engine: Engine, batches: list[Batch], known: MutableMapping[str, float], progress: Progress
) -> None:
    """Give every site what the allocator asks for of its block and its layer, in one pass of the dense model.

    ``known`` has what was measured on this text before, and gets what is new. Raises :class:`NonFiniteError` for a
    block whose statistic is not finite.
    """
    statistic = engine.strategy.allocator.block_statistic
    if statistic is None or not engine.cuts:
        return
    blocks: list[Block] = [(cut.site.layer, kind) for cut in engine.cuts for kind in (cut.site.kind, None)]
    if any(_key(statistic, block) not in known for block in blocks):
        known.update((_key(statistic, block), mean) for block, mean in _means(engine, batches, statistic, progress))
    for cut in engine.cuts:
        of_block, of_layer = (known[_key(statistic, (cut.site.layer, kind))] for kind in (cut.site.kind, None))
        cut.state.describe_blocks(of_block, of_layer)


def _key(statistic: BlockStatistic, block: Block) -> str:
    return f"{statistic.identity_text} layer {block[0]} {block[1] or 'whole'}"


def _means(
    engine: Engine, batches: list[Batch], statistic: BlockStatistic, progress: Progress
) -> Iterator[tuple[Block, float]]:
    """The statistic's mean over all real tokens, block by block."""
    sums: dict[Block, float] = defaultdict(float)
    tokens: dict[Block, int] = defaultdict(int)

    def see(block: Block, entering: Tensor, leaving: Tensor) -> None:
        batch = engine.shared.running.batch
        assert batch is not None  # the decoder is running
        valid = batch.valid_on(leaving.device)
        states = [each.to(leaving.device).reshape(*batch.shape, -1) for each in (entering, leaving)]
        real = [each.flatten(0, 1) if valid is None else each[valid] for each in states]
        found = statistic.measure(*(each.float() for each in real))
        sums[block] += found.double().sum().item()
        tokens[block] += len(found)

    with engine.calibrating(lambda *_: None, ()), _seen(engine, see):
        for batch in progress(batches, "measuring blocks", len(batches)):
            run_batch(engine, batch)
    for block, total in sums.items():
        mean = total / tokens[block]
        if not math.isfinite(mean):
            raise NonFiniteError(
                f"layer {block[0]} {block[1] or ''}".rstrip() + f": {statistic.name} of what enters and leaves this "
                f"block is NaN or infinite; nothing was pruned. {FINITE_REMEDY}"
            )
        yield block, mean


@contextmanager
def _seen(engine: Engine, see: See) -> Iterator[None]:
    """Within it ``see`` gets what enters and leaves every block of every layer that is called."""
    read: dict[int, list[tuple[SiteKind, Tensor]]] = {}
    """By layer: what the norms of its sites have read."""

    def enter(site: Site, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        read.setdefault(site.layer, []).append((site.kind, stream_before(site, module, args, kwargs)))

    def leave(number: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        leaving = output[0] if isinstance(output, tuple) else output
        see((number, None), split(layer, args, kwargs)[0], leaving)
        after = leaving
        for kind, entering in reversed(read.pop(number, [])):
            see((number, kind), entering, leaving if after is entering else after)  # blocks may read one stream
            after = entering

    with ExitStack() as stack:
        for site in engine.all_sites:
            reads = engine.model.get_submodule(site.norm or site.entry)
            stack.callback(reads.register_forward_pre_hook(partial(enter, site), with_kwargs=True).remove)
        for number, layer in enumerate(engine.layers):
            stack.callback(layer.register_forward_hook(partial(leave, number), with_kwargs=True).remove)
        yield
