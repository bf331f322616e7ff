"""Routed experts as data: the matrices of one expert, and the sites of a layer of experts.

transformers 5 stores the experts of a layer in 3-D tensors: E experts, D hidden size, I channels of one expert. They
are ``gate_up_proj`` (E, 2I, D), or ``up_proj`` (E, I, D) without a gate, and ``down_proj`` (E, D, I); in a transposed
layout the last two sizes change places. The rows of gate and up lie one after the other, or in turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..sites import ExpertUnit, Producer, Rows, Site
from .devices import is_offloaded

DOWN = "down_proj"
UPS = ("gate_up_proj", "up_proj")
GROUPS = ("num_group", "n_group", "num_expert_group")
"""Names of a router's attribute for groups of experts, of which it chooses some."""


class ExpertLinear(nn.Linear):
    """One expert's matrix as a linear layer: a view of the tensor that holds those of all experts.

    It is not part of the model: it has no parameters of its own.
    """

    experts: Any
    tensor: str
    number: int
    turned: bool

    def __init__(self, experts: nn.Module, tensor: str, number: int):
        nn.Module.__init__(self)
        vars(self).update(experts=experts, tensor=tensor, number=number, turned=is_turned(experts))
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # a view is made anew wherever it is read
        """(O, I) of the expert."""
        view = getattr(self.experts, self.tensor)[self.number]
        return view.t() if self.turned else view

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]  # as the weight
        """(O,) of the expert, where it has one."""
        biases = getattr(self.experts, f"{self.tensor}_bias", None)
        return None if biases is None else biases[self.number]

    def get_parameter(self, target: str) -> Any:
        return getattr(self, target)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        yield "weight", self.weight
        if self.bias is not None:
            yield "bias", self.bias


class ExpertNorms(nn.Linear):
    """Stands for the layer that reads whole experts: its weight (1, E) has the Frobenius norm of each ``down_proj``."""

    experts: Any

    def __init__(self, experts: nn.Module):
        nn.Module.__init__(self)
        vars(self).update(experts=experts)
        self.in_features, self.out_features = count_of(experts), 1
        self.register_parameter("bias", None)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # it is computed wherever it is read
        """(1, E) float32."""
        return torch.stack([each.float().norm() for each in self.source.detach()])[None]

    @property
    def source(self) -> Tensor:
        """What the weight is computed from."""
        return self.experts.get_parameter(DOWN)

    def get_parameter(self, target: str) -> Any:
        return getattr(self, target)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        return iter(())


def linear_at(model: nn.Module, path: str) -> Any:
    """The linear layer at a site's path: a module, or a matrix of one expert (:class:`ExpertLinear`)."""
    owner, *inside = path.split(":")
    module = model.get_submodule(owner)
    if not inside:
        return module
    return ExpertNorms(module) if len(inside) == 1 else ExpertLinear(module, inside[0], int(inside[1]))


def experts_in(module: nn.Module) -> dict[str, nn.Module]:
    """The modules inside that hold routed experts in 3-D tensors, by their path in ``module``."""
    return {path: each for path, each in module.named_modules() if _holds_experts(each)}


def expert_linears(module: nn.Module) -> list[ExpertLinear]:
    """All matrices of all routed experts inside ``module``."""
    return [
        ExpertLinear(experts, tensor, number)
        for experts in experts_in(module).values()
        for number in range(count_of(experts))
        for tensor in (up_of(experts), DOWN)
    ]


def count_of(experts: nn.Module) -> int:
    """The number of experts E."""
    return experts.get_parameter(DOWN).shape[0]


def up_of(experts: nn.Module) -> str:
    """The name of the tensor that makes the channels."""
    return next(name for name in UPS if hasattr(experts, name))


def has_gate(experts: nn.Module) -> bool:
    """Whether gate and up are rows of one tensor."""
    return up_of(experts) == UPS[0]


def is_turned(experts: nn.Module) -> bool:
    """Whether the tensors are (E, inputs, outputs); shapes show it where there is a gate."""
    made, read = experts.get_parameter(up_of(experts)).shape, experts.get_parameter(DOWN).shape
    return (
        made[2] == 2 * read[1] and made[1] == read[2]
        if has_gate(experts)
        else bool(getattr(experts, "is_transposed", 0))
    )


def activated(experts: Any, made: Tensor) -> Tensor:
    """The channels (n, I) from what gate and up have made (n, 2I), by the experts' own gate; without one, (n, I)."""
    return experts._apply_gate(made) if has_gate(experts) else experts.act_fn(made)


def expert_sites(
    model: nn.Module,
    layer: int,
    norm: str | None,
    experts: str,
    router: str,
    unit: ExpertUnit,
    top_k: int | None = None,
) -> list[Site]:
    """The sites of one layer's routed experts, by the paths of its norm, its experts and its router.

    ``norm`` is None where the block reads the residual stream itself.

    ``channels``: a site for every expert, whose units are its I channels. ``whole``: one site, whose units are the E
    experts; those that the router chooses for every token, ``top_k`` (None: the router's attribute), must stay.
    Raises :class:`ModelError` for experts that cannot be cut.
    """
    holder: Any = model.get_submodule(experts)
    _check(holder, experts)
    count, chosen = count_of(holder), _chosen(model, router, top_k)
    channel = _unit_of_channel(holder, experts)
    shared: dict[str, Any] = {"layer": layer, "norm": norm, "entry": experts, "reached": min(1.0, chosen / count)}
    if unit == "channels":
        segments, parameters = channel
        down = ExpertLinear(holder, DOWN, 0)
        return [
            Site(
                kind=f"expert{number}",
                expert=number,
                producers=(Producer(f"{experts}:{up_of(holder)}:{number}", segments),),
                consumer=f"{experts}:{DOWN}:{number}",
                units=down.in_features,
                unit_size=1,
                unit_parameters=parameters,
                outputs=down.out_features,
                **shared,
            )
            for number in range(count)
        ]
    routing, block = model.get_submodule(router), model.get_submodule(router.rpartition(".")[0])
    _check_groups(routing, block, router)
    each = sum(tensor[0].numel() for tensor in holder.parameters(recurse=False) if len(tensor) == count)
    tensors = [getattr(*owned) for owned in tensors_by_expert(block, routing, count)]
    rows = sum(tensor.numel() // count for tensor in tensors if isinstance(tensor, nn.Parameter))
    whole = Site(
        kind="experts",
        producers=(),
        consumer=f"{experts}:norms",
        units=count,
        unit_size=1,
        unit_parameters=each + rows,
        outputs=1,
        router=router,
        least=chosen,
        **shared,
    )
    return [whole]


Owned = tuple[nn.Module, str]
"""A module, and the name of a tensor of it."""


def tensors_by_expert(block: nn.Module, router: nn.Module, count: int) -> dict[Owned, int]:
    """The parameters and buffers of a router that have an entry for each of ``count`` experts, and in which dimension:
    (E, ...), or (1, E). Some are in the block that calls it."""
    return {
        (module, name): 0 if len(tensor) == count else 1
        for module in dict.fromkeys([block, *router.modules()])
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.dim() and (len(tensor) == count or tensor.shape == (1, count))
    }


@contextmanager
def cut_router(block: nn.Module, router: nn.Module, count: int, kept: Tensor) -> Iterator[None]:
    """Within it a router of ``count`` experts has only the rows, biases and counts of those that are kept (k,)."""
    modules = dict.fromkeys([block, *router.modules()])
    numbers = [
        (module, name) for module in modules for name, value in vars(module).items() if _counts(name, value, count)
    ]
    tensors = tensors_by_expert(block, router, count)
    try:
        for module, name in numbers:
            vars(module)[name] = len(kept)
        for (module, name), dim in tensors.items():  # an attribute of this name hides the parameter, which stays
            tensor = getattr(module, name)
            vars(module)[name] = tensor.index_select(dim, kept.to(tensor.device))
        yield
    finally:
        for module, name in numbers:
            vars(module)[name] = count
        for module, name in tensors:
            vars(module).pop(name, None)


def _counts(name: str, value: Any, count: int) -> bool:
    return "expert" in name and type(value) is int and value == count


def _holds_experts(module: nn.Module) -> bool:
    tensors = [module._parameters.get(name) for name in (DOWN, *UPS)]
    return tensors[0] is not None and tensors[0].dim() == 3 and any(each is not None for each in tensors[1:])


def _check(experts: Any, path: str) -> None:
    """Raise :class:`ModelError` for experts that are stored or computed otherwise than this module knows."""
    kind, leave = (
        f"{path} is a {type(experts).__module__}.{type(experts).__qualname__}",
        "leave them out (experts: keep)",
    )
    if isinstance(experts, nn.ModuleList):
        raise ModelError(
            f"{kind}: its experts are modules of their own, and experts are cut where they lie in 3-D tensors "
            f"(transformers 5 loads them so); {leave}"
        )
    if not _holds_experts(experts) or not (hasattr(experts, "_apply_gate") or hasattr(experts, "act_fn")):
        raise ModelError(
            f"{kind}, without plain tensors gate_up_proj (or up_proj) and down_proj (quantised experts cannot be cut); "
            f"load the model unquantised, or {leave}"
        )
    if is_offloaded(experts):
        raise ModelError(f"{path}: its experts are offloaded, and are read one by one; keep them in memory, or {leave}")
    if getattr(experts, "_is_expert_parallel", False):
        raise ModelError(f"{path}: its experts are distributed over processes; load the model in one, or {leave}")


def _chosen(model: Any, router: str, top_k: int | None) -> int:
    """How many experts the router chooses for every token."""
    places = (model.get_submodule(router), model.get_submodule(router.rpartition(".")[0]), model.config)
    names = ("top_k", "num_experts_per_tok", "moe_topk")
    found = [getattr(place, name, None) for place in places for name in names]
    number = top_k or next((number for number in found if isinstance(number, int)), None)
    if number is None:
        raise ModelError(f"{router}: how many experts it chooses for every token is not known; state it as top_k")
    return number


def _check_groups(router: nn.Module, block: nn.Module, path: str) -> None:
    """Raise :class:`ModelError` for a router that chooses groups of experts first."""
    groups = max((getattr(each, name, None) or 1 for each in (router, block) for name in GROUPS), default=1)
    if groups > 1:
        raise ModelError(
            f"{path} divides its experts into {groups} groups of equal size, so that whole experts cannot go; cut "
            "channels inside the experts (experts: channels, with a strategy such as wanda_sp)"
        )


@torch.no_grad()
def _unit_of_channel(experts: Any, path: str) -> tuple[tuple[Rows, ...], int]:
    """The rows of the first matrix that make a channel, and the parameters of a channel.

    Where there is a gate, it is asked: a change of row 1 changes channel 0 if the rows lie in turns, else channel 1.
    """
    made, down = ExpertLinear(experts, up_of(experts), 0), ExpertLinear(experts, DOWN, 0)
    units = down.in_features
    per_unit = (made.in_features + (made.bias is not None)) * (made.out_features // units) + down.out_features
    if made.out_features != (2 if has_gate(experts) else 1) * units:
        raise ModelError(f"{path}: {made.out_features} rows make {units} channels; these experts cannot be cut")
    if not has_gate(experts):
        return (Rows(0, 1),), per_unit
    device = "cpu" if made.weight.is_meta else made.weight.device  # the gate has no weights
    probe = torch.full((2, 2 * units), 0.5, dtype=made.weight.dtype, device=device)
    probe[1, 1] = 0.75
    changed = activated(experts, probe)
    where = (changed[0] != changed[1]).nonzero().flatten().tolist()
    if where not in ([0], [1]):
        raise ModelError(f"{path}: its gate mixes channels, so that none can be cut")
    return ((Rows(0, 2),) if where == [0] else (Rows(0, 1), Rows(units, 1))), per_unit


def plain_expert(experts: Any, number: int, x: Tensor) -> Tensor:
    """What one expert makes of tokens x (n, D), all channels kept and not weighted by the router; (n, D)."""
    made, down = ExpertLinear(experts, up_of(experts), number), ExpertLinear(experts, DOWN, number)
    return normed(experts, down(activated(experts, made(x))))


def normed(experts: Any, outputs: Tensor) -> Tensor:
    """The experts' own norm of their outputs (n, D), where they have one."""
    return experts.post_expert_norm(outputs) if getattr(experts, "has_post_expert_norm", False) else outputs
