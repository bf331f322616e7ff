"""Parts C and D of compensation_width.py: the cost of compensation per batch, and how much decisions change."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers
from prunekit.compress.bundled import MODEL, TEXTS
from prunekit.compress.engine.compensation import SiteCompensation
from prunekit.compress.pruning.prune import prune
from prunekit.compress.runs.text import calibration_batches
from prunekit.registry import ChannelMoments, Compensator, Site, SiteCovariance, complement
from prunekit.registry.tensors.windows import cut_windows, token_stream
from prunekit.strategies.compensation import LeastSquares, LowRankLeastSquares
from torch import Tensor
from width_measures import Activations, build, cut_one, operations_of, seconds_of, site_of, tokens_of
from width_sizes import RIDGE, Sizes

SWAPPED = (0.0, 0.05, 0.1, 0.2)
GATHERED = 4096
"""Tokens of the covariance whose compensation is timed: times do not depend on its values."""
SEQUENCES = 32
"""Calibration sequences of part D."""


def per_batch(sizes: Sizes, kind: str, ratio: float) -> dict[str, Any]:
    """Part C: one decision's slope and folding by every method, compared with dense and with the cut's saving."""
    model = build(sizes)
    ids = tokens_of(sizes.timed_rows, sizes.length)
    found: dict[str, Any] = {"kind": kind, "ratio": ratio}
    with torch.no_grad(), cut_one(model, "magnitude", kind, ratio) as pruned:
        site, count = site_of(pruned, kind), pruned.counts[0, kind]
        found |= _block(model, pruned, ids, sizes.batch_rows / sizes.timed_rows, sizes.repeats)
        weight = model.get_submodule(site.consumer).weight.detach()
        del model
        methods = _methods(site, count, weight, sizes)
    return found | {"channels": site.channels, "kept": count * site.unit_size, "methods": methods}


def _block(model: Any, pruned: Any, ids: Tensor, scale: float, repeats: int) -> dict[str, Any]:
    """Seconds and operations of the dense block and of the statically cut one, scaled up to the whole batch."""

    def forward(tokens: Tensor = ids) -> None:
        model.model(input_ids=tokens, use_cache=False)

    def seconds() -> float:
        forward(ids[:1, :2])  # gathers the kept weights, which a static cut does once
        return seconds_of(forward, 1)

    operations = operations_of(forward)
    with pruned.dense():
        dense_operations = operations_of(forward)
    cut, dense = [], []
    for _ in range(repeats):  # in turn, so that a busy machine slows both
        cut.append(seconds())
        with pruned.dense():
            dense.append(seconds())
    saved = median(whole - part for whole, part in zip(dense, cut, strict=True))
    return {
        "dense": {"seconds": scale * median(dense), "operations": scale * dense_operations},
        "saved": {"seconds": scale * saved, "operations": scale * (dense_operations - operations)},
    }


def _methods(site: Site, count: int, weight: Tensor, sizes: Sizes) -> list[dict[str, Any]]:
    moments = ChannelMoments(site.channels, torch.device("cpu"))
    moments.observe(Activations(site.channels).sample(min(GATHERED, sizes.tokens))[None], None)
    covariance = moments.take_covariance()
    usual = torch.randperm(site.units, generator=torch.Generator().manual_seed(1))[:count].sort().values
    same = site.columns(usual)
    swapped = {share: site.columns(_swapped(usual, site.units, share)) for share in SWAPPED}
    found = []

    def measure(compensator: Compensator, cases: dict[str, Tensor]) -> None:
        prepared = compensator.prepare(SiteCovariance(covariance.clone(), moments.tokens, same, once=False))
        for label, kept in cases.items():
            found.append(_measured(label, compensator, prepared, site, weight, kept, sizes.repeats))

    measure(LeastSquares(ridge=RIDGE, per_batch="solve"), {"solve": same})
    measure(
        LeastSquares(ridge=RIDGE),
        {f"pivot {share:.0%} swapped": kept for share, kept in swapped.items()},
    )
    measure(LeastSquares(ridge=RIDGE, per_batch="usual"), {"usual": swapped[0.1]})
    for rank in sizes.ranks:
        measure(LowRankLeastSquares(ridge=RIDGE, rank=rank), {f"low rank {rank}": same})
    return found


def _swapped(usual: Tensor, units: int, share: float) -> Tensor:
    """The calibrated units with a share of them replaced by others; (k,) -> (k,) ascending."""
    others = complement(usual, units)
    count = min(round(share * len(usual)), len(others))
    return torch.cat([usual[count:], others[:count]]).sort().values


def _measured(
    label: str, compensator: Compensator, prepared: Any, site: Site, weight: Tensor, kept: Tensor, repeats: int
) -> dict[str, Any]:
    dropped = complement(kept, site.channels)
    slope = compensator.slope(prepared, kept, dropped)
    cut = weight.index_select(1, kept)
    folding = SiteCompensation(site, compensator, fixed=slope)
    steps: dict[str, Callable[[], Any]] = {
        "slope": lambda: compensator.slope(prepared, kept, dropped),
        "fold": lambda: folding.weight(cut, kept, folding.folded(weight, kept)),
    }
    found: dict[str, Any] = {"method": label, "held": compensator.memory_plan(site.channels, len(dropped), True).held}
    for step, work in steps.items():
        found[step] = {"operations": operations_of(work), "seconds": seconds_of(work, repeats)}
    return found


def swap_share(sizes: Sizes, ratio: float) -> dict[str, Any]:
    """Part D: on the bundled model, the share of PP's kept units per batch that calibration alone would not keep."""
    torch.set_num_threads(sizes.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    rows, length = sizes.swap_rows, sizes.swap_length
    documents = [TEXTS["docstrings-calibration"].read_text(encoding="utf-8")]
    calibration = calibration_batches(tokenizer, documents, SEQUENCES, length, rows, 0)
    stream = token_stream([TEXTS["reference-evaluation"].read_text(encoding="utf-8")], tokenizer)
    windows = [window.ids for window in cut_windows(stream, length, tail="drop")]
    starts = range(0, len(windows) - rows + 1, rows)
    batches = [torch.stack(windows[at : at + rows]) for at in starts[: sizes.swap_batches]]
    options = {"ratio": ratio, "skip_layers": (0,), "calibration": calibration, "trace": True}
    with prune(model, "pp", selector=None, merger=None, **options) as pruned:
        usual = {(seen["layer"], seen["kind"]): set(seen["kept"]) for seen in pruned.trace}
    with prune(model, "pp", **options) as pruned, torch.no_grad():
        for batch in batches:
            model.model(input_ids=batch, use_cache=False)
        trace = pruned.trace
    shares: dict[str, list[float]] = {}
    for seen in trace:
        kept = set(seen["kept"])
        shares.setdefault(seen["kind"], []).append(len(kept - usual[seen["layer"], seen["kind"]]) / len(kept))
    return {
        "sequences": SEQUENCES,
        "batches": len(batches),
        "ratio": ratio,
        "kinds": {kind: {"mean": sum(found) / len(found), "most": max(found)} for kind, found in shares.items()},
    }
