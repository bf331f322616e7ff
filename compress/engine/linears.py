"""The linear layers of a site. The way a product is computed is chosen here, and nowhere else.

A layer gets another class, and keeps its parameters and the keys of its state dict. Letters: D hidden size,
r kept rows of a producer, c kept channels, O outputs of the consumer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ...registry import ExpertLinear, ModelError, Producer, Selection
from ...registry.tensors.devices import is_offloaded
from ...registry.tensors.kernels import usable_on
from ...registry.tensors.linears import matrix_of
from .batch import Batch
from .copying import Unpickled
from .gathering import store_row_major
from .grouped_cut import GroupedCut
from .open_cut import OpenCut
from .site_cut import SiteCut

FUSED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class SiteLinear(Unpickled, nn.Linear):
    """An ``nn.Linear`` of a site."""

    site_cut: SiteCut
    replaced: type[nn.Module]
    """The class that the layer had."""
    transposed: ClassVar[bool] = False
    """Whether the weight is stored with its inputs first."""

    def note(self, batch: Batch) -> None:
        """Note that the batch, or its probe, has called this layer."""
        probe = batch.probe
        (probe if probe is not None and probe.is_running else batch.sites[self.site_cut.number]).read.add(self)


class ProducerLinear(SiteLinear):
    """Computes a site's channels: q/k/v, gate/up, fc1."""

    producer: Producer

    def forward(self, x: Tensor) -> Tensor:
        """All rows while the site's cut is closed, as in a probe, else the kept ones; (..., D) -> (..., r)."""
        open_cut, batch = self.site_cut.open_cut, self.site_cut.shared.running.batch
        if batch is not None and batch.steady and open_cut is not None:
            return functional.linear(x, *open_cut.ready[self])
        if open_cut is not None and open_cut.absent:
            return x[..., :0]
        probe = None if batch is None else batch.probe
        products = None if probe is None else probe.products
        if batch is not None and not batch.steady:
            self.note(batch)
        if open_cut is None:
            made = functional.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
            if products is not None and probe is not None and probe.is_running:
                products.outputs[self] = made
            return made
        if isinstance(open_cut, GroupedCut):
            return open_cut.linear(x, batch, lambda part: part.producer(self, self.producer))
        if open_cut.fuses and _can_fuse(self, x, dim=0):
            return _fused_producer(self, open_cut, x)
        weight, bias = open_cut.producer(self, self.producer)
        if products is not None and self in products.outputs:
            hidden = products.hidden
            if (x.data_ptr(), x.numel(), x.dtype) == (hidden.data_ptr(), hidden.numel(), hidden.dtype):
                return products.linear(self, weight, bias, open_cut.rows[self]).view(*x.shape[:-1], -1)
        return functional.linear(x, weight, bias)


class ExpertProducer(ProducerLinear, ExpertLinear):
    """Computes the channels of a routed expert; it is part of no model, and its experts' module calls it."""


class ConsumerLinear(SiteLinear):
    """Reads a site's channels: o_proj, down_proj, fc2."""

    def forward(self, x: Tensor) -> Tensor:
        """What the kept channels contribute, compensation included; (..., c) -> (..., O).

        In a probe x is kept, nothing is multiplied, and what the block computes afterwards is not used.
        """
        site_cut, batch = self.site_cut, self.site_cut.shared.running.batch
        if batch is not None and batch.steady and site_cut.open_cut is not None:
            return functional.linear(x, *site_cut.open_cut.ready[self])
        if site_cut.open_cut is not None and site_cut.open_cut.absent:
            return site_cut.open_cut.constant(x)
        if batch is not None and not batch.steady:
            self.note(batch)
            if batch.probe is not None and batch.probe.is_running:
                batch.probe.states = x
                return x[..., :1].expand(*x.shape[:-1], self.out_features)
            if batch.observe is not None:
                batch.observe(site_cut, x)
        open_cut = site_cut.open_cut
        if open_cut is None:
            return functional.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)
        if isinstance(open_cut, GroupedCut):
            return open_cut.linear(x, batch, OpenCut.consumer)
        if open_cut.fuses and not site_cut.compensation.wanted and _can_fuse(self, x, dim=1):
            return _fused_consumer(self, open_cut, x)
        return functional.linear(x, *open_cut.consumer())

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Checkpoints want contiguous weights. They share the layer's memory, so the layer gets them too."""
        with self.site_cut.shared.running.one_at_a_time.lock:
            store_row_major(self)
            super()._save_to_state_dict(*args, **kwargs)


class ExpertConsumer(ConsumerLinear, ExpertLinear):
    """Reads the channels of a routed expert."""


class TransposedProducer(ProducerLinear):
    """A producer whose weight is stored as (D, R): transformers' ``Conv1D``."""

    transposed = True


class TransposedConsumer(ConsumerLinear):
    """A consumer whose weight is stored as (C, O): transformers' ``Conv1D``."""

    transposed = True


ADOPTED: dict[type[nn.Module], tuple[type[SiteLinear], type[SiteLinear]]] = {
    nn.Linear: (ProducerLinear, ConsumerLinear),
    Conv1D: (TransposedProducer, TransposedConsumer),
    ExpertLinear: (ExpertProducer, ExpertConsumer),
}
"""What layers of a class become as a site's producer and as its consumer."""


def _can_fuse(linear: SiteLinear, x: Tensor, dim: int) -> bool:
    """Whether the kernel can read kept rows (0) or columns (1) of this layer: each must lie in one piece."""
    weight = matrix_of(linear)
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or is_offloaded(linear):
        return False
    return weight.stride(1 - dim) == 1 and x.dtype == weight.dtype and x.dtype in FUSED_DTYPES and usable_on(weight)


def _fused_producer(linear: ProducerLinear, open_cut: OpenCut, x: Tensor) -> Tensor:
    from .fused_linear import linear_of_rows

    weight, bias = open_cut.shared.applier.producer(matrix_of(linear), linear.bias, open_cut.rows[linear])
    assert isinstance(weight, Selection) and not isinstance(bias, Tensor)
    return linear_of_rows(x, weight.source, weight.index, None if bias is None else bias.copied())


def _fused_consumer(linear: ConsumerLinear, open_cut: OpenCut, x: Tensor) -> Tensor:
    from .fused_linear import linear_of_columns

    weight = open_cut.shared.applier.consumer(matrix_of(linear), open_cut.columns)
    assert isinstance(weight, Selection)
    return linear_of_columns(x, weight.source, weight.index, linear.bias)


def adopt(linear: nn.Module, path: str, site_cut: SiteCut, producer: Producer | None = None) -> None:
    """Make ``linear`` a producer of a site, or its consumer.

    Raises :class:`ModelError` for anything but plain weights in a plain ``nn.Linear``, in transformers' ``Conv1D``, or
    in a subclass that the site names.
    """
    if isinstance(linear, SiteLinear):
        raise ModelError(f"{path} is already part of a pruned model; call remove() on that one first")
    if type(linear) not in ADOPTED and not _is_declared(linear, site_cut):
        kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
        remedy = (
            "merge the adapter first (model = model.merge_and_unload())"
            if kind.startswith("peft.")
            else "load the model unquantised, and prune it before its layers are replaced"
        )
        raise ModelError(
            f"{path} is a {kind}, not a plain nn.Linear (quantised and adapter layers cannot be cut); {remedy}"
        )
    unplain = [name for name, tensor in linear.named_parameters() if type(tensor) is not nn.Parameter]
    if unplain and not isinstance(linear, ExpertLinear):
        tensor = linear.get_parameter(unplain[0])
        raise ModelError(
            f"{path}.{unplain[0]} is a {type(tensor).__module__}.{type(tensor).__qualname__}, not a plain tensor "
            "(quantised and distributed weights cannot be cut); load the model unquantised and in one process"
        )
    _drop_plain_forward(linear)
    if "forward" in linear.__dict__ and not hasattr(linear, "_old_forward"):
        raise ModelError(
            f"{path}: something has replaced the forward of this {type(linear).__name__} on the layer itself, so a cut "
            "would never run; undo that first, or load the model again"
        )
    replaced = linear.__dict__["replaced"] = type(linear)
    if isinstance(linear, Conv1D):
        vars(linear).update(in_features=linear.nx, out_features=linear.nf)
    as_producer, as_consumer = ADOPTED.get(replaced, ADOPTED[nn.Linear])
    _turn_into(linear, as_consumer if producer is None else as_producer)
    linear.__dict__["site_cut"] = site_cut
    if producer is not None:
        linear.__dict__["producer"] = producer


def release(linear: nn.Module, site_cut: SiteCut) -> None:
    """Undo :func:`adopt`, where the layer is still this site's."""
    if linear.__dict__.get("site_cut") is not site_cut:
        return
    replaced = linear.__dict__["replaced"]
    _turn_into(linear, replaced)
    sizes = ("in_features", "out_features") if replaced is Conv1D else ()
    for name in ("site_cut", "producer", "replaced", *sizes):
        linear.__dict__.pop(name, None)
    _drop_plain_forward(linear)


def _is_declared(linear: nn.Module, site_cut: SiteCut) -> bool:
    """Whether the layer is of a subclass of ``nn.Linear`` that computes the same, as its site says."""
    return isinstance(linear, nn.Linear) and type(linear).__name__ in site_cut.site.linear_types


def _turn_into(linear: Any, kind: type[nn.Module]) -> None:
    linear.__class__ = kind
    if hasattr(linear, "_old_forward"):  # accelerate keeps the forward that it wrapped
        linear._old_forward = kind.forward.__get__(linear)


def _drop_plain_forward(linear: nn.Module) -> None:
    """Accelerate, taking its hooks off, leaves the class's forward on the layer, which would outlive the class."""
    own = getattr(linear.__dict__.get("forward"), "__func__", None)
    if own in (nn.Linear.forward, type(linear).forward, ProducerLinear.forward, ConsumerLinear.forward):
        del linear.forward
