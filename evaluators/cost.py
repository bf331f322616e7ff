"""Floating point operations of a forward pass by part, and parameters of the kept units, pruned and dense.

The formulas extend torch's counter by attention on CPUs, matrix-vector products and linear systems. They are leading
terms as in Golub and Van Loan, Matrix Computations, with two operations for each multiply-add. What has no formula here
or in torch counts as zero: decompositions by QR, eigenvalues and singular values among it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Size, Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..registry import Evaluator, Measurement, Site, SiteKind, Subject, hookimpl, linear_at
from ..registry.tensors.linears import is_linear, sizes_of
from .parts import HEAD, MLP, OTHER, PROJECTIONS, SCORES, Key, attributed
from .passes import OneBatch, clamped, prefill, setting, short_pass

PROBE, COMPENSATION = "probe", "compensation"
PARTS = (PROJECTIONS, SCORES, MLP, HEAD, PROBE, COMPENSATION, OTHER)
PART_OF_STAGE = {"probe": PROBE, "compensate": COMPENSATION}


class Cost(OneBatch):
    """Operations per token of a prefill, part by part, and the parameters of the kept units, pruned and dense.

    Both run on the same batch; where nothing is probed or decided for the batch, its first row stands for all, because
    every row takes the same operations. Matrix products, linear systems and attention are counted, the strategy's own
    too, with the whole square of the attention (not half of it for causality) and the output layer at every position.
    Element-wise work, scores, sorting and copies of weights are not counted. The parts add up to ``flops``: the
    attention's projections, its scores (all of the attention but its linear layers), the MLP, the output layer, the
    probe, the compensation, and the rest. A short pass comes first and is not counted: it contains what a static cut
    does once, such as folding its compensation into the weights.

    ``floor`` is the cost of a model sliced to the same counts beforehand, without probe and compensation. It is
    computed from the dense model's parts and the sites' shapes, not counted; ``over_floor`` is the pruned model's cost
    divided by it. ``reused`` is what the batch saves because the probe has already computed its tokens, if the runtime
    reuses that (on a CPU).

    Parameters do not measure memory: a strategy that probes keeps all of them, and reads all of them to decide. A batch
    changes the history of strategies that probe; the pipeline restores it before each evaluator.
    """

    paired: ClassVar[bool] = True

    name: Literal["cost"] = "cost"

    def evaluate(self, subject: Subject) -> Measurement:
        """Count; raises DataError if ``text`` is too short for the batch."""
        length = clamped(self.length, subject.model)
        ids = self.batch(subject, length)
        one = ids[:1]
        pruned_ids = ids if subject.depends_on_batch else one
        pruned, kept, parameters = operations(subject, pruned_ids), subject.kept(), subject.parameters()
        with subject.dense():
            dense, dense_parameters = operations(subject, one), subject.parameters()
        pruned, dense = repeated(pruned, len(ids) // len(pruned_ids)), repeated(dense, len(ids))
        tokens, total, dense_total = ids.numel(), sum(pruned.values()), sum(dense.values())
        values: dict[str, float | int | None] = {
            "flops": total / tokens,
            "dense_flops": dense_total / tokens,
            "flops_ratio": total / dense_total,
        }
        if subject.sites:
            floor = sliced_operations(subject.model, subject.sites, kept, dense, tokens)
            values |= {
                "floor": floor / tokens,
                "floor_ratio": floor / dense_total,
                "over_floor": total / floor if floor else None,
            }
            parts, dense_parts = by_part(pruned), by_part(dense)
            values["decoder_flops_ratio"] = (total - parts[HEAD]) / (dense_total - dense_parts[HEAD])
            for prefix, counted in (("", parts), ("dense_", dense_parts)):
                values |= {f"{prefix}{part}": amount / tokens for part, amount in counted.items()}
            added = parts[PROBE] + parts[COMPENSATION] + parts[OTHER] - dense_parts[OTHER]
            values["reused"] = max(0, floor - (total - added)) / tokens
        values |= {
            "parameters": parameters,
            "dense_parameters": dense_parameters,
            "parameters_ratio": parameters / dense_parameters,
        }
        protocol = {
            "flops": "per token of a prefill; matrix products, linear systems and full-square attention, output layer "
            "at every position, probe and compensation included; element-wise work and copies not counted",
            "compensation": "what every batch takes; what is folded into the weights once is not counted",
            "reused": "per token: what the batch is spared because the probe has computed it of its own tokens",
            "floor": "per token, computed: the dense parts without the cut units' weights and scores, no probe and no "
            "compensation",
            "parameters": "parameters of the units that stay; a dynamic strategy's probe and its memory still use all",
            **self.about_batch(length),
            "rows": "dense: the first stands for all; pruned: " + ("all" if len(pruned_ids) > 1 else "the first, too"),
            "order": "pruned, dense",
            "torch": torch.__version__,
            **setting(subject.model),
        }
        return Measurement(values, protocol)


def operations(subject: Subject, ids: Tensor) -> dict[Key, int]:
    """Floating point operations of one forward pass without a cache, by part and layer; ids (B, T).

    Operations during a strategy's probe count as the probe's, those while it compensates as the compensation's, and
    those of its other steps as ``other``'s. An uncounted pass before contains the change between pruned and dense;
    channel histories are restored after it, so that the counted batch is a first one.
    """
    short_pass(subject.model, ids)
    subject.reset()
    with (
        torch.no_grad(),
        FlopCounterMode(display=False, custom_mapping=formulas()) as counter,
        attributed(subject, counter.get_total_flops, lambda stage: PART_OF_STAGE.get(stage, OTHER)) as spent,
    ):
        prefill(subject.model, ids)
    return dict(spent)


def repeated(counted: Mapping[Key, int], rows: int) -> dict[Key, int]:
    """Operations of ``rows`` rows by those of one."""
    return {key: rows * amount for key, amount in counted.items()}


def by_part(counted: Mapping[Key, int]) -> dict[str, int]:
    """Operations of each of :data:`PARTS`, over all layers."""
    return {part: sum(amount for (name, _), amount in counted.items() if name == part) for part in PARTS}


def sliced_operations(
    model: Any,
    sites: Sequence[Site],
    kept: Mapping[tuple[int, SiteKind], Sequence[int]],
    dense: Mapping[Key, int],
    tokens: int,
) -> int:
    """Operations of ``model`` sliced to the number of units that ``kept`` has of each site, without anything else.

    ``dense`` are the dense model's operations on ``tokens`` tokens. A cut unit saves two operations per token for each
    weight of its rows and columns, and its share of its layer's attention scores.
    """
    total = sum(dense.values())
    for site in sites:
        units = kept.get((site.layer, site.kind))
        cut = 0 if units is None else site.units - len(units)
        if cut:
            whole = cut == site.units
            weights = weights_of_block(model, site) if whole else cut * weights_of_unit(model, site)
            total -= round(2 * tokens * site.reached * weights)
            if site.kind == "attention":
                total -= dense.get((SCORES, site.layer), 0) * cut // site.units
    return total


def weights_of_block(model: Any, site: Site) -> int:
    """Number of linear weights of a whole site, without biases; more than its units have where heads are shared."""
    return sum(linear.weight.numel() for linear in linears_of_block(model, site))


def linears_of_block(model: Any, site: Site) -> list[Any]:
    """The linear layers that go with a site that keeps nothing."""
    paths = [*(producer.path for producer in site.producers), site.consumer]
    linears = [linear_at(model, path) for path in paths]
    inside = [m for m in model.get_submodule(site.entry).modules() if is_linear(m)]
    return list(dict.fromkeys([*linears, *(inside if site.expert is None else ())]))


def tensors_of_units(model: Any, site: Site) -> list[Tensor]:
    """Parameters with entries of units that are in no linear layer of the site."""
    found = [getattr(model.get_submodule(each.path), each.name) for each in site.unit_tensors]
    return [p for each in found for p in ([each] if isinstance(each, Tensor) else each.parameters())]


def weights_of_unit(model: Any, site: Site) -> int:
    """Number of linear weights of one unit, without biases; of a whole expert those that every token reads.

    A token reads as many experts as before, so that a whole expert saves its rows of the router alone.
    """
    if site.router is not None:
        return round(sum(p.numel() for p in model.get_submodule(site.router).parameters()) / site.units / site.reached)
    rows = (
        (sum(segment.per_unit for segment in producer.segments), sizes_of(linear_at(model, producer.path))[1])
        for producer in site.producers
    )
    return sum(count * width for count, width in rows) + site.unit_size * site.outputs


def formulas() -> dict[Any, Any]:
    """Operation -> formula of its arguments' shapes, for ``FlopCounterMode(custom_mapping=...)``."""
    places = (torch.ops.aten, torch.ops.transformers)
    return {
        getattr(place, name): formula for name, formula in FORMULAS.items() for place in places if hasattr(place, name)
    }


def _attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Two matrix products for every query head; shapes (B, H, Tq, d), (B, Hkv, Tk, d), (B, Hkv, Tk, dv)."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _added_product(start: Size, left: Size, right: Size, **_: Any) -> int:
    """(..., m, k) by (..., k, n), in place: torch counts only the product that makes a new tensor."""
    return 2 * prod(left) * right[-1]


def _grouped_product(left: Size, right: Size, *_: Any, **__: Any) -> int:
    """Rows (S, k) of routed experts, each by the matrix of one: (E, k, n)."""
    return 2 * prod(left[-2:]) * right[-1] * (left[0] if len(left) == len(right) == 3 else 1)


def _matrix_vector(matrix: Size, vector: Size, **_: Any) -> int:
    """(m, n) by (n,)."""
    return 2 * prod(matrix)


def _added_matrix_vector(start: Size, matrix: Size, vector: Size, **_: Any) -> int:
    return _matrix_vector(matrix, vector)


def _dot(one: Size, other: Size, **_: Any) -> int:
    return 2 * prod(one)


def _outer(start: Size, column: Size, row: Size, **_: Any) -> int:
    """(m, n) plus the product of (m,) and (n,), as a matrix product counts it."""
    return 2 * prod(column) * prod(row)


def _cholesky(matrix: Size, *_: Any, **__: Any) -> int:
    """(..., n, n): n^3 / 3."""
    return prod(matrix) * matrix[-1] // 3


def _lu(matrix: Size, *_: Any, **__: Any) -> int:
    """(..., n, n): 2 n^3 / 3."""
    return 2 * prod(matrix) * matrix[-1] // 3


def _inverse(matrix: Size, *_: Any, **__: Any) -> int:
    """(..., n, n): 2 n^3, with the factors."""
    return 2 * prod(matrix) * matrix[-1]


def _triangular_solve(matrix: Size, right: Size, *_: Any, **__: Any) -> int:
    """(..., n, n) and m right sides as rows or columns: m n^2."""
    return _right_sides(matrix, right) * matrix[-1] ** 2


def _factored_solve(right: Size, factor: Size, *_: Any, **__: Any) -> int:
    """Two triangular systems: 2 m n^2."""
    return 2 * _triangular_solve(factor, right)


def _lu_solve(factor: Size, pivots: Size, right: Size, *_: Any, **__: Any) -> int:
    return 2 * _triangular_solve(factor, right)


def _solve(matrix: Size, right: Size, *_: Any, **__: Any) -> int:
    """The factors, and two triangular systems."""
    return _lu(matrix) + 2 * _triangular_solve(matrix, right)


def _right_sides(matrix: Size, right: Size) -> int:
    """Number of vectors of length n that a system (..., n, n) is solved for, broadcast ones counted each time."""
    if len(right) == 1 or right == matrix[:-1]:
        return prod(matrix[:-2])
    batch = torch.broadcast_shapes(matrix[:-2], right[:-2])
    return prod(batch) * prod(right[-2:]) // matrix[-1] if matrix[-1] else 0


FORMULAS: dict[str, Any] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_grouped_mm": _grouped_product,
    "grouped_mm_fallback": _grouped_product,
    "addmm_": _added_product,
    "baddbmm_": _added_product,
    "mv": _matrix_vector,
    "addmv": _added_matrix_vector,
    "addmv_": _added_matrix_vector,
    "dot": _dot,
    "addr": _outer,
    "addr_": _outer,
    "linalg_cholesky_ex": _cholesky,
    "cholesky_solve": _factored_solve,
    "cholesky_inverse": lambda factor, *_, **__: 2 * _cholesky(factor),
    "linalg_solve_triangular": _triangular_solve,
    "linalg_lu_factor_ex": _lu,
    "linalg_lu_solve": _lu_solve,
    "_linalg_solve_ex": _solve,
    "linalg_inv_ex": _inverse,
}
"""Name in ``torch.ops.aten`` or ``torch.ops.transformers``, if it is there -> formula of the arguments' shapes."""


@hookimpl
def evaluators() -> list[type[Evaluator]]:
    return [Cost]
