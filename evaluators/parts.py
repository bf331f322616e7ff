"""Who is charged for what a forward pass spends, operations or seconds: the model's parts and a strategy's steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from torch import nn

from ..registry import Subject

PROJECTIONS, SCORES, MLP, HEAD, OTHER = "attention_projections", "attention_scores", "mlp", "head", "other"

Key = tuple[str, int | None]
"""A part and the decoder layer that it belongs to; None for what belongs to no layer."""

Amount = TypeVar("Amount", int, float)


class Ledger(Generic[Amount]):
    """Charges what ``read`` has risen by to the innermost part at work; what runs in none is ``("other", None)``'s.

    Parts may nest: an inner one's share is not the outer one's. All charges together are what ``read`` rose by.
    """

    def __init__(self, read: Callable[[], Amount]):
        self.spent: dict[Key, Amount] = defaultdict(int)
        self._read, self._last = read, read()
        self._stack: list[Key] = [(OTHER, None)]
        self._held = False

    def enter(self, key: Key) -> None:
        """Charge ``key`` from now on."""
        if not self._held:
            self.settle()
            self._stack.append(key)

    def leave(self) -> None:
        """Charge what was charged before the last :meth:`enter`."""
        if not self._held:
            self.settle()
            self._stack.pop()

    @contextmanager
    def held(self, part: str) -> Iterator[None]:
        """Charge everything within to ``part``, whichever modules run there and whatever else is announced."""
        if self._held:
            yield
            return
        self.enter((part, None))
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.leave()

    def settle(self) -> None:
        """Charge what has been spent until now."""
        now = self._read()
        self.spent[self._stack[-1]] += now - self._last
        self._last = now


@contextmanager
def charged(
    subject: Subject, read: Callable[[], Amount], stage_part: Callable[[str], str]
) -> Iterator[dict[Key, Amount]]:
    """Within it everything that ``subject``'s model does is charged by :class:`Ledger`; gives what was spent.

    Modules are charged as :func:`module_keys` says, a step of the deciding (one of
    :data:`~prunekit.registry.STAGES`) as ``stage_part`` of its name, wherever in a module it happens.
    """
    handles = []
    try:
        keys = module_keys(subject)
        ledger: Ledger[Amount] = Ledger(read)
        for module, key in keys.items():
            handles.append(module.register_forward_pre_hook(lambda *_, key=key: ledger.enter(key)))
            handles.append(module.register_forward_hook(lambda *_: ledger.leave()))
        with subject.watch(lambda name: ledger.held(stage_part(name))):
            yield ledger.spent
            ledger.settle()
    finally:
        for handle in handles:
            handle.remove()


def module_keys(subject: Subject) -> dict[nn.Module, Key]:
    """The modules that parts consist of: every site's, whether it is cut or not, and the output embeddings.

    Within an attention the linear layers are its projections, those that are no producers too; the rest of it is
    its scores.
    """
    model = subject.model
    keys: dict[nn.Module, Key] = {}
    for site in subject.sites:
        linears = [*(producer.path for producer in site.producers), site.consumer]
        entry = model.get_submodule(site.entry)
        if site.kind == "attention":
            keys[entry] = SCORES, site.layer
            inner = [module for module in entry.modules() if isinstance(module, nn.Linear)]
            keys.update(dict.fromkeys(inner, (PROJECTIONS, site.layer)))
            keys.update(dict.fromkeys(map(model.get_submodule, linears), (PROJECTIONS, site.layer)))
        else:
            paths = [*linears, *([site.activation] if site.activation else [])]
            keys[entry] = MLP, site.layer
            keys.update(dict.fromkeys(map(model.get_submodule, paths), (MLP, site.layer)))
    head = model.get_output_embeddings() if subject.sites else None
    if head is not None:
        keys[head] = HEAD, None
    return keys
