"""Work beside the model's own: on CUDA devices on a stream of its own, elsewhere at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStreams:
    """One further stream for each CUDA device that is used.

    What is made beside is used on the model's stream after :meth:`join` only, and is to be handed to :meth:`share`.
    """

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def used(self) -> bool:
        """Whether anything was done beside so far."""
        return bool(self._streams)

    @contextmanager
    def beside(self, *inputs: Tensor) -> Iterator[None]:
        """Within it work is done beside the model's, when all that it was given so far is done; ``inputs`` are read."""
        device = inputs[0].device
        if not self._wanted or device.type != "cuda" or torch.compiler.is_compiling():
            yield
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
        for tensor in inputs:
            tensor.record_stream(stream)

    def join(self) -> None:
        """Have the model's streams wait for what was done beside them."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def share(self, *made: Tensor | None) -> None:
        """Keep memory of what was made beside from being reused while the model's stream reads it."""
        for tensor in made:
            if tensor is not None and tensor.device in self._streams:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
