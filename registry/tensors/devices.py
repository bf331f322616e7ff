"""Where a module computes and where its weights are: accelerate may place a model on devices, in memory and on disk.

An offloaded module's weights are placeholders on torch's ``meta`` device. The hook that accelerate puts around the
module's forward brings them for as long as that forward runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Accelerate's hooks on a module itself, chained ones one by one."""
    hook = getattr(module, "_hf_hook", None)
    waiting = [] if hook is None else [hook]
    while waiting:
        hook = waiting.pop(0)
        waiting += getattr(hook, "hooks", ())
        yield hook


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are loaded only while its forward runs."""
    return hasattr(module, "_hf_hook") and any(getattr(hook, "offload", False) for hook in _hooks(module))


def device_of(module: nn.Module) -> torch.device:
    """The device that a module with a ``weight`` computes on, wherever that weight is stored now.

    Raises :class:`ModelError` for a weight without values that no hook loads.
    """
    weight = module.get_parameter("weight")
    device = weight.device
    if device.type != "meta":
        return device
    brought = (hook.execution_device for hook in _hooks(module) if getattr(hook, "offload", False))
    found = next((device for device in brought if device is not None), None)
    if found is None:
        raise ModelError(
            f"a {type(module).__name__} {tuple(weight.shape)} of the model is on the meta device, where it "
            "has no values, and no hook of accelerate loads them; load the model with from_pretrained"
        )
    return torch.device(found)


def unautocast(tensor: Tensor) -> AbstractContextManager:
    """Within it the caller's autocast does not lower the dtype of products on this tensor's device."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


@contextmanager
def weights_present(module: nn.Module) -> Iterator[None]:
    """Within it the module's own weights have their values on the device that it computes on."""
    if not is_offloaded(module) or module.get_parameter("weight").device.type != "meta":
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def stored_tensor(model: nn.Module, name: str) -> Tensor | None:
    """The values of an offloaded parameter or buffer, read from accelerate's store; None if it is not there.

    ``name`` is its key in the state dict.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        owner, rest = ".".join(parts[:depth]), ".".join(parts[depth:])
        for hook in _hooks(model.get_submodule(owner)):
            stored: Any = getattr(hook, "weights_map", None)
            try:
                return stored[rest]
            except (KeyError, TypeError):  # not stored here
                continue
    return None


def places_of(model: nn.Module) -> dict[str, int]:
    """Number of modules with own weights in each place of accelerate's device map, in the model's order.

    Places are "cuda:0", "cpu", "disk". Empty if the model is in one place and runs there.
    """
    mapped = getattr(model, "hf_device_map", {})
    if len(set(mapped.values())) < 2 and "disk" not in mapped.values():
        return {}
    found: Counter[str] = Counter()
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            above = [key for key in mapped if key in ("", name) or name.startswith(f"{key}.")]
            if above:
                found[place_name(mapped[max(above, key=len)])] += 1
    return dict(found)


def place_name(place: int | str | torch.device) -> str:
    """The name of a place in messages: accelerate numbers CUDA devices."""
    return f"cuda:{place}" if isinstance(place, int) else str(place)
