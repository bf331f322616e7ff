"""The linear layers of a site: adopted by class, so that parameters and state-dict keys stay what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ...registry import ModelError, Producer

if TYPE_CHECKING:
    from .site_cut import SiteCut


class SiteLinear(nn.Linear):
    """An ``nn.Linear`` that belongs to a site and computes with what the site's cut gives it."""

    site_cut: SiteCut
    site_producer: Producer | None
    """Which producer this is; ``None`` for the consumer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.site_producer is None:
            return self.site_cut.consume(self, x)
        return self.site_cut.produce(self, self.site_producer, x)


def adopt(linear: nn.Module, path: str, cut: SiteCut, producer: Producer | None) -> None:
    """Make ``linear`` part of a site; raises :class:`ModelError` for anything but a plain ``nn.Linear``."""
    if isinstance(linear, SiteLinear):
        raise ModelError(f"{path} is already part of a pruned model; call remove() on that one first")
    if type(linear) is not nn.Linear:
        raise ModelError(
            f"{path} is a {type(linear).__name__}, not a plain nn.Linear (quantised and adapter layers cannot be cut)"
        )
    _drop_plain_forward(linear)
    if "forward" in linear.__dict__ and not hasattr(linear, "_old_forward"):
        raise ModelError(
            f"{path}: something has replaced the forward of this nn.Linear on the layer itself, so a cut would never "
            "run; undo that first, or load the model again"
        )
    linear.__class__ = SiteLinear
    linear.site_cut, linear.site_producer = cut, producer
    if hasattr(linear, "_old_forward"):  # accelerate keeps the forward it wrapped
        linear._old_forward = SiteLinear.forward.__get__(linear)


def release(linear: nn.Module) -> None:
    """Undo :func:`adopt`."""
    if isinstance(linear, SiteLinear):
        linear.__class__ = nn.Linear
        del linear.site_cut, linear.site_producer
        if hasattr(linear, "_old_forward"):
            linear._old_forward = nn.Linear.forward.__get__(linear)
        _drop_plain_forward(linear)


def _drop_plain_forward(linear: nn.Module) -> None:
    """Accelerate, taking its hooks off, leaves the class's forward on the layer, which would outlive the class."""
    own = getattr(linear.__dict__.get("forward"), "__func__", None)
    if own in (nn.Linear.forward, SiteLinear.forward):
        del linear.forward
