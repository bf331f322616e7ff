"""The hooks that make one loaded model decide, cut and learn while it runs, and leave nothing behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..registry import ChannelHistory, DataError, Site, Strategy
from . import leaf, reference_padding
from .arguments import named as named_arguments
from .arguments import valid_tokens
from .attention import enable_kv_index
from .cut import SiteCut
from .decision import Decider, Decision
from .probing import CACHE_ARGUMENT
from .stages import Stages

Mode = Literal["dense", "calibrate", "prune"]

Learn = Callable[[SiteCut, Tensor, "Tensor | None"], None]
"""Takes what enters a consumer, (B, T, C), and the batch's real tokens (B, T) or None."""

_tokens = itertools.count()


class Engine:
    """Adopts a model's sites and runs a strategy on them until :meth:`remove`."""

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        sites: list[Site],
        strategy: Strategy,
        trace: list | None = None,
        attention_outputs: Sequence[str] = (),
    ):
        """``attention_outputs`` are the paths of all layers' out-projections, skipped layers included."""
        self.model, self.strategy, self.trace = model, strategy, trace
        self._layers, self._attention_outputs = layers, attention_outputs
        self.mode: Mode = "dense"
        self._removed = False
        self.stages = Stages()
        self.cuts = [SiteCut.resolve(site, model, strategy, self.stages) for site in sites]
        self.decider = Decider(strategy, self.stages)
        self.decoder = model.get_submodule(layers.rpartition(".")[0])
        """The module that owns the layers: one call of it is one batch."""
        self.batch = -1
        self.calibrated: Collection[SiteCut] | None = None
        """Sites that calibration looks at; None for all."""
        self.learn: Learn = self.decider.calibrate
        """What calibration does with what enters a site's consumer."""
        self._counted = False
        self._token = f"prunekit-{next(_tokens)}"
        self._cache: Any = None
        self._filled = 0
        self._shape = (0, 0)
        self._valid: Tensor | None = None
        self._handles: list = []
        self._undo: list = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        layers = list(self.model.get_submodule(self._layers))
        for cut in self.cuts:
            for producer in cut.site.producers:
                leaf.adopt(self.model.get_submodule(producer.path), producer.path, cut, producer)
            leaf.adopt(cut.consumer, cut.site.consumer, cut, None)
            cut.observe = self._observe
        if self.strategy.applier.resizes and any(cut.site.query_heads_per_kv for cut in self.cuts):
            self._undo.append(enable_kv_index(self.model))
        before = dict(with_kwargs=True)
        self._handles.append(self.decoder.register_forward_pre_hook(self._enter_model, **before))
        self._handles.append(self.decoder.register_forward_hook(self._succeed))
        self._handles.append(self.decoder.register_forward_hook(self._leave_model, always_call=True))
        for index in sorted({cut.site.layer for cut in self.cuts}):
            self._handles.append(layers[index].register_forward_pre_hook(self._enter_layer(index), **before))
        if self.strategy.probes_with is None:
            return
        if self.strategy.pad_handling == "reference":
            outputs = [self.model.get_submodule(path) for path in self._attention_outputs]
            self._handles += reference_padding.install(layers, outputs, self._padding_of)
        for cut in self.cuts:
            self._handles.append(cut.norm.register_forward_pre_hook(_keep_residual(cut)))
            self._handles.append(cut.entry.register_forward_pre_hook(self._enter_site(cut), **before))
            self._handles.append(cut.consumer.register_forward_hook(self._leave_site(cut)))

    def remove(self) -> None:
        """Take everything off the model: afterwards it is bit-identical to before, and stays so."""
        self.mode, self._removed = "dense", True
        self._uninstall()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the model is as it was before, and may be pruned by something else."""
        previous = self.mode
        self._switch("dense")
        self._uninstall()
        try:
            yield
        finally:
            if not self._removed:
                self._install()
            self._switch(previous)

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cut in self.cuts:
            cut.close()
            for path in (*(p.path for p in cut.site.producers), cut.site.consumer):
                linear = self.model.get_submodule(path)
                if getattr(linear, "site_cut", None) is cut:
                    leaf.release(linear)
        for undo in self._undo:
            undo()
        self._undo.clear()

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        return self.model.get_submodule(f"{self._layers}.{index}")

    def start(self) -> None:
        """Prune from now on."""
        self._switch("prune")

    @contextmanager
    def running(self, mode: Mode) -> Iterator[None]:
        """Run in another mode for a while; the cuts of static strategies close and open again with it."""
        previous = self.mode
        self._switch(mode)
        try:
            yield
        finally:
            self._switch(previous)

    @contextmanager
    def learning(self, cuts: Collection[SiteCut], learn: Learn) -> Iterator[None]:
        """Within it calibration looks at these sites alone, and does ``learn`` with what enters their consumers."""
        before = self.calibrated, self.learn
        self.calibrated, self.learn = cuts, learn
        try:
            yield
        finally:
            self.calibrated, self.learn = before

    def _switch(self, mode: Mode) -> None:
        if self._removed:
            return
        self.mode = mode
        for cut in self.cuts:
            if mode == "prune" and cut.fixed is not None:
                cut.open(cut.fixed)
            elif mode == "dense":
                cut.close()

    def histories(self) -> list[ChannelHistory]:
        """Copies of all channel histories, for :meth:`restore`."""
        return [cut.history.clone() for cut in self.cuts]

    def restore(self, histories: list[ChannelHistory] | None) -> None:
        """Put channel histories back, where they change at all; count batches and draw from the start."""
        for cut, history in zip(self.cuts, histories or (), strict=bool(histories)):
            cut.history = history.clone()
        self.batch = -1
        self.decider.restart()

    # What happens during a forward pass, in this order.

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        named = named_arguments(module, args, kwargs)
        tokens = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
        self._shape = tuple(tokens.shape[:2])
        self._valid = valid_tokens(named.get("attention_mask"), *self._shape)
        self._cache = None
        self._counted = False

    def _enter_layer(self, index: int):
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            self._cache = named_arguments(layer, args, kwargs).get(CACHE_ARGUMENT)
            if self._cache is None:
                self._filled = 0
                return
            self._filled = int(self._cache.get_seq_length(index))
            decided, pruning = self._decided(), self.mode == "prune"
            if not self._filled:
                # A cache that was reset and is used for a new prompt must not bring back its old decision.
                for key in [key for key in decided if key[0] == index]:
                    del decided[key]
                if pruning:
                    decided[index, "pruned"] = None
            elif pruning != ((index, "pruned") in decided):
                how, now = ("without", "with") if pruning else ("with", "without")
                raise DataError(
                    f"layer {index}: the key/value cache already holds {self._filled} positions that were computed "
                    f"{how} this pruning, and the model now runs {now} it; start the prompt with an empty cache"
                )

        return hook

    def _decided(self) -> dict:
        """Decisions that go with the generation's key/value cache: decode steps reuse the prefill's."""
        return self._cache.__dict__.setdefault(self._token, {})

    def _enter_site(self, cut: SiteCut):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            residual, cut.residual = cut.residual, None
            if self.mode != "prune" or cut.probing or cut.whole:
                return
            key = (cut.site.layer, cut.site.kind)
            if self._cache is not None and key in self._decided():
                cut.open(*self._decided()[key])
                return
            arguments = named_arguments(module, args, kwargs)
            hidden = args[0] if args else kwargs["hidden_states"]
            device = cut.history.device
            hidden, residual = (t.to(device).reshape(*self._shape, t.shape[-1]) for t in (hidden, residual))
            if not self._counted:
                self.batch += 1
                self._counted = True
            decision = self.decider.decide(cut, hidden, residual, self._valid_on(device), arguments)
            cut.open(decision.kept, decision.probe_mean)
            if self._cache is not None:
                self._decided()[key] = decision.kept, decision.probe_mean
            self.record(cut, self.batch, decision)

        return hook

    def _leave_site(self, cut: SiteCut):
        def hook(consumer: nn.Module, args: tuple, output: Any) -> None:
            # Without a cache nothing will ask for this cut again: its gathered weights can go.
            if self.mode == "prune" and self._cache is None and not cut.probing and cut.fixed is None:
                cut.close()

        return hook

    def _observe(self, cut: SiteCut, x: Tensor) -> None:
        """History learns from what enters a consumer: everything in calibration, kept channels afterwards."""
        if self.mode == "calibrate":
            if self.calibrated is not None and cut not in self.calibrated:
                return
            learn = self.learn
        elif self.mode == "prune" and self.decider.learns and cut.kept is not None and not self._filled:
            learn = self.decider.learn  # not in decode steps: their tokens stand elsewhere than their columns say
        else:
            return
        with torch.no_grad():
            learn(cut, x.detach().reshape(*self._shape, x.shape[-1]), self._valid_on(x.device))

    def _valid_on(self, device: torch.device) -> Tensor | None:
        """The batch's real tokens where a layer computes: the batch may come from elsewhere."""
        if self._valid is not None and self._valid.device != device:
            self._valid = self._valid.to(device)
        return self._valid

    def _succeed(self, module: nn.Module, args: tuple, output: Any) -> None:
        with torch.no_grad():
            self.decider.commit(self.cuts)

    def _leave_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.mode == "prune" and self._cache is None:
            for cut in self.cuts:
                if cut.fixed is None:
                    cut.close()
        self.decider.forget(self.cuts)
        self._cache = self._valid = None
        self._filled = 0

    def _padding_of(self, states: Tensor) -> Tensor | None:
        """Padded tokens (b, t) of the full batch, or of the probe while one runs; None where all are real."""
        if self.mode != "prune" or self._valid is None:
            return None
        valid = self.decider.probe_valid if self.decider.probe_valid is not None else self._valid_on(states.device)
        return ~valid

    def record(self, cut: SiteCut, batch: int | None, decision: Decision) -> None:
        """Add a decision to the trace, where one is kept; ``batch`` is None for decisions made once."""
        if self.trace is not None:
            where = {"batch": batch, "layer": cut.site.layer, "kind": cut.site.kind}
            seen = {name: getattr(decision, name).tolist() for name in ("kept", "rows", "positions")}
            self.trace.append(where | seen)


def _keep_residual(cut: SiteCut):
    def hook(norm: nn.Module, args: tuple) -> None:
        cut.residual = args[0]

    return hook
