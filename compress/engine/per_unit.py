"""What else has entries of a site's units, and is cut along with its linear layers: parameters such as attention sinks
and norms per head, arguments such as ALiBi, and what a norm over all heads returns.

Parameters stay on the module, with their keys in the state dict: for as long as a call of the module lasts, its forward
reads the kept entries under their name. Only sites that declare such things have these hooks. Letters: k kept units.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ...registry import Producer, Rows, UnitTensor
from .batch import split
from .copying import Hook
from .site_cut import SiteCut


def cut_along(cut: SiteCut, model: nn.Module) -> Iterator[Callable[[], Any]]:
    """Install the hooks of a site on ``model``; yields functions that undo it."""
    site = cut.site
    by_module = defaultdict(list)
    for tensor in site.unit_tensors:
        by_module[tensor.path].append(tensor)
    for path, tensors in by_module.items():
        module: Any = model.get_submodule(path)
        if hasattr(module, "_old_forward"):  # accelerate brings offloaded weights, and then calls this
            forward = module._old_forward
            module._old_forward = Hook(_called, cut, tensors, module, forward)
            yield partial(setattr, module, "_old_forward", forward)
            continue
        yield module.register_forward_pre_hook(Hook(_show, cut, tensors)).remove
        yield module.register_forward_hook(Hook(_hide, tensors), always_call=True).remove
        yield partial(_hide, tensors, module)
    if site.unit_arguments:
        yield cut.binding.entry.register_forward_pre_hook(Hook(_arguments, cut), with_kwargs=True).remove
    for producer in site.selected:
        module = model.get_submodule(producer.path)
        yield module.register_forward_hook(Hook(_select, cut, producer)).remove


def _kept(cut: SiteCut) -> Tensor | None:
    """The kept units (k,); None where all are computed."""
    open_cut = cut.open_cut
    return None if open_cut is None or open_cut.absent else open_cut.kept


def _show(cut: SiteCut, tensors: Sequence[UnitTensor], module: nn.Module, *_: Any) -> None:
    kept = _kept(cut)
    if kept is None:
        return
    for tensor in tensors:
        whole, rows = getattr(module, tensor.name), tensor.rows.of(kept)
        if isinstance(whole, Tensor):
            vars(module)[tensor.name] = whole.index_select(0, rows)
        else:
            vars(module)[tensor.name] = [whole[row] for row in rows.tolist()]


def _hide(tensors: Sequence[UnitTensor], module: nn.Module, *_: Any) -> None:
    for tensor in tensors:
        vars(module).pop(tensor.name, None)


def _called(
    cut: SiteCut, tensors: Sequence[UnitTensor], module: nn.Module, forward: Callable, *args: Any, **kwargs: Any
) -> Any:
    _show(cut, tensors, module)
    try:
        return forward(*args, **kwargs)
    finally:
        _hide(tensors, module)


def _arguments(cut: SiteCut, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
    kept = _kept(cut)
    if kept is None:
        return None
    site, (states, others) = cut.site, split(module, args, kwargs)
    for argument in site.unit_arguments:
        value = others.get(argument.name)
        if isinstance(value, Tensor):
            rows = Rows(0, argument.per_unit).of(kept)
            others[argument.name] = _heads(value, site.units * argument.per_unit, rows)
    return (states,), others


def _heads(value: Tensor, heads: int, rows: Tensor) -> Tensor:
    """The kept heads of a :class:`~prunekit.registry.UnitArgument`."""
    dim = 1 if value.dim() == 4 else 0
    if value.shape[dim] == 1:
        return value
    return value.unflatten(dim, (-1, heads)).index_select(dim + 1, rows).flatten(dim, dim + 1)


def _select(cut: SiteCut, producer: Producer, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
    kept = _kept(cut)
    return None if kept is None else output.index_select(-1, producer.rows(kept))
