"""Attributes what a forward pass spends, operations or seconds, to the model's parts and a strategy's steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

from torch import nn

from ..registry import Subject
from ..registry.tensors.linears import is_linear

PROJECTIONS, SCORES, MLP, HEAD, OTHER = "attention_projections", "attention_scores", "mlp", "head", "other"

Key = tuple[str, int | None]
"""A part and its decoder layer; None for a part outside of the layers."""

Amount = TypeVar("Amount", int, float)


class Attribution(Generic[Amount]):
    """Distributes a growing total, such as operations or seconds, over the parts of the model that run.

    ``read`` returns the total. Its increase counts for the innermost part that runs, and for ``("other", None)``
    outside of all parts, so the parts' amounts add up to the whole increase.
    """

    def __init__(self, read: Callable[[], Amount]):
        self.spent: dict[Key, Amount] = defaultdict(int)
        self._read: Callable[[], Amount] = read
        self._last: Amount = read()
        self._stack: list[Key] = [(OTHER, None)]
        self._stepping = False

    def enter(self, key: Key) -> None:
        """Attribute to ``key`` from now on."""
        if not self._stepping:
            self.update()
            self._stack.append(key)

    def leave(self) -> None:
        """Attribute to the part before the last :meth:`enter`."""
        if not self._stepping:
            self.update()
            self._stack.pop()

    @contextmanager
    def step(self, part: str) -> Iterator[None]:
        """A context in which everything is attributed to ``part``, whatever modules run and other steps begin."""
        if self._stepping:
            yield
            return
        self.enter((part, None))
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
            self.leave()

    def update(self) -> None:
        """Attribute what was spent until now."""
        now = self._read()
        self.spent[self._stack[-1]] += now - self._last
        self._last = now


@contextmanager
def attributed(
    subject: Subject, read: Callable[[], Amount], stage_part: Callable[[str], str]
) -> Iterator[dict[Key, Amount]]:
    """A context in which an :class:`Attribution` assigns what ``subject``'s model spends; yields what was spent.

    Modules are attributed to the parts of :func:`module_keys`, a strategy's step (one of
    :data:`~prunekit.registry.STAGES`) to ``stage_part`` of its name, in whatever module it happens.
    """
    handles = []
    try:
        attribution: Attribution[Amount] = Attribution(read)
        for module, key in module_keys(subject).items():
            handles.append(module.register_forward_pre_hook(partial(_enter, attribution, key)))
            handles.append(module.register_forward_hook(lambda *_: attribution.leave()))
        with subject.watch(lambda name: attribution.step(stage_part(name))):
            yield attribution.spent
            attribution.update()
    finally:
        for handle in handles:
            handle.remove()


def _enter(attribution: Attribution, key: Key, module: nn.Module, arguments: object) -> None:
    attribution.enter(key)


def module_keys(subject: Subject) -> dict[nn.Module, Key]:
    """The modules of each part: those of every site, cut or not, and the output embeddings.

    All linear layers within an attention are its projections, not only the producers; the rest is its scores.
    """
    model = subject.model
    keys: dict[nn.Module, Key] = {}
    for site in subject.sites:
        linears = [*(producer.path for producer in site.producers), site.consumer]
        entry = model.get_submodule(site.entry)
        if site.kind == "attention":
            keys[entry] = SCORES, site.layer
            inner = [module for module in entry.modules() if is_linear(module)]
            keys.update(dict.fromkeys(inner, (PROJECTIONS, site.layer)))
            keys.update(dict.fromkeys(map(model.get_submodule, linears), (PROJECTIONS, site.layer)))
        else:
            paths = [*linears, *([site.activation] if site.activation else [])]
            keys[entry] = MLP, site.layer
            if not site.routed:  # an expert's matrices are not modules
                keys.update(dict.fromkeys(map(model.get_submodule, paths), (MLP, site.layer)))
    head = model.get_output_embeddings() if subject.sites else None
    if head is not None:
        keys[head] = HEAD, None
    return keys
