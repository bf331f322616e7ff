"""What the PP reference does to padded tokens, for reproducing its numbers: it zeroes them in the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

PaddingOf = Callable[[Tensor], "Tensor | None"]


def install(layers: list[nn.Module], attention_consumers: list[nn.Module], padding_of: PaddingOf) -> list:
    """Zero padded tokens where they enter the first layer and where they enter any out-projection.

    ``padding_of`` tells which tokens of the running pass are padding, (b, t) bool or None. Returns hook handles.
    """

    def zeroed(states: Tensor) -> Tensor | None:
        padding = padding_of(states)
        return None if padding is None else states.masked_fill(padding[..., None], 0)

    def first_layer(layer: nn.Module, args: tuple, kwargs: dict):
        states = args[0] if args else kwargs["hidden_states"]
        clean = zeroed(states)
        if clean is None:
            return None
        return ((clean, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": clean})

    def out_projection(linear: nn.Module, args: tuple):
        clean = zeroed(args[0])
        return None if clean is None else (clean,)

    handles = [layers[0].register_forward_pre_hook(first_layer, with_kwargs=True)]
    return handles + [linear.register_forward_pre_hook(out_projection) for linear in attention_consumers]
