"""The hooks that make one loaded model decide, cut and learn while it runs, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ...registry import ChannelHistory, Site, Strategy
from . import site_linear
from .call_arguments import learn_names
from .compensation import without_probe
from .compiling import compile_decoder
from .decider import Decider
from .forward_pass import ForwardPass, Learn, Mode
from .gathering import Gatherer, store_column_major
from .kv_index import enable_kv_index
from .runtime import Runtime
from .site_cut import SiteCut
from .watching import Stages


class Engine:
    """Adopts a model's sites and runs a strategy on them until :meth:`remove`."""

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        sites: list[Site],
        strategy: Strategy,
        trace: list | None = None,
        all_sites: Sequence[Site] = (),
        runtime: Runtime | None = None,
    ):
        """``sites`` can be cut; ``all_sites`` are those of skipped layers, too."""
        self.model, self.strategy = model, strategy
        self.runtime = Runtime() if runtime is None else runtime
        self._layers, self.all_sites = layers, tuple(all_sites)
        self._removed = self.is_suspended = False
        self.stages = Stages()
        self.gatherer = Gatherer(self.runtime)
        self.cuts = [SiteCut.resolve(site, model, strategy, self.stages, self.gatherer) for site in sites]
        self.decider = Decider(strategy, self.stages)
        self.running_pass = ForwardPass(self.cuts, strategy, self.decider, self.runtime, trace)
        self.decoder = model.get_submodule(layers.rpartition(".")[0])
        """The module that owns the layers: one call of it is one batch."""
        self._handles: list = []
        self._undo: list = []
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        layers = list(self.model.get_submodule(self._layers))
        passing = self.running_pass
        for cut in self.cuts:
            for linear, producer in cut.producers:
                site_linear.adopt(linear, producer.path, cut, producer)
            site_linear.adopt(cut.consumer, cut.site.consumer, cut, None)
            cut.observe = passing.observe
        if self.strategy.applier.resizes and any(cut.site.query_heads_per_kv for cut in self.cuts):
            self._undo.append(enable_kv_index(self.model))
        if self.runtime.compile is not None:
            self._undo.append(compile_decoder(self.decoder, self.runtime.compile, passing, self.stages))
        learn_names(self.decoder, *layers, *(cut.entry for cut in self.cuts))
        before = dict(with_kwargs=True)
        self._handles.append(self.decoder.register_forward_pre_hook(passing.enter_model, **before))
        self._handles.append(self.decoder.register_forward_hook(passing.succeed))
        self._handles.append(self.decoder.register_forward_hook(passing.leave_model, always_call=True))
        for index in sorted({cut.site.layer for cut in self.cuts}):
            self._handles.append(layers[index].register_forward_pre_hook(passing.enter_layer(index), **before))
        if self.strategy.probes_with is None:
            return
        self._handles += self.strategy.install(self.model, layers, self.all_sites, passing.padding_of)
        for cut in self.cuts:
            self._handles.append(cut.norm.register_forward_pre_hook(passing.enter_norm(cut)))
            self._handles.append(cut.entry.register_forward_pre_hook(passing.enter_site(cut), **before))
            self._handles.append(cut.consumer.register_forward_hook(passing.leave_site(cut)))

    def remove(self) -> None:
        """Take everything off the model: afterwards it is bit-identical to before, and stays so."""
        self.running_pass.mode, self._removed = "dense", True
        self._uninstall()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within it the model is as it was before, and may be pruned by something else."""
        previous = self.mode
        self._switch("dense")
        self._uninstall()
        self.is_suspended = True
        try:
            yield
        finally:
            self.is_suspended = False
            if not self._removed:
                self._install()
            self._switch(previous)

    def _uninstall(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for cut in self.cuts:
            cut.close()
            for linear in (*(linear for linear, _ in cut.producers), cut.consumer):
                if getattr(linear, "site_cut", None) is cut:
                    site_linear.release(linear)
        self.gatherer.release()
        while self._undo:  # what was undone is not undone again, should another fail
            self._undo.pop()()

    def freeze(self, kept: Sequence[Tensor]) -> None:
        """Make every site's cut once and for all: kept (k,) int64 ascending for each, in the order of ``cuts``.

        What is given back becomes what calibration alone knows of. Raises :class:`SpecError` where a compensator
        cannot do without a probe; nothing has changed then.
        """
        compensator = without_probe(self.strategy.compensate)
        changes = {"selector": None, "merger": None, "compensate": compensator}
        previous, trace = self.mode, self.running_pass.trace
        self._switch("dense")
        self._uninstall()
        self.strategy = self.strategy.model_copy(update=changes)
        self.decider = Decider(self.strategy, self.stages)
        self.running_pass = ForwardPass(self.cuts, self.strategy, self.decider, self.runtime, trace)
        for cut, units in zip(self.cuts, kept, strict=True):
            cut.fixed, cut.merger = (None if cut.whole else units), None
            cut.compensation.compensator = compensator
        self._install()
        self._switch(previous)

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        return self.model.get_submodule(f"{self._layers}.{index}")

    def start(self) -> None:
        """Prune from now on."""
        self._switch("prune")
        for cut in self._cut_per_batch():
            cut.prepare()

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
        passing = self.running_pass
        before = passing.calibrated, passing.learn
        passing.calibrated, passing.learn = cuts, learn
        try:
            yield
        finally:
            passing.calibrated, passing.learn = before

    @property
    def mode(self) -> Mode:
        return self.running_pass.mode

    def _switch(self, mode: Mode) -> None:
        if self._removed:
            return
        self.running_pass.mode = mode
        for cut in self.cuts:
            if mode == "prune" and cut.fixed is not None:
                cut.open(cut.fixed, stays=True)
            elif mode == "dense":
                cut.close()
        if mode == "dense":
            self.gatherer.release()
        if mode == "prune" and self.runtime.column_major:
            for cut in self._cut_per_batch():
                undo = store_column_major(cut.consumer) if cut.weights.selects else None
                if undo is not None:
                    self._undo.append(undo)

    def _cut_per_batch(self) -> list[SiteCut]:
        return [cut for cut in self.cuts if not cut.whole] if self.strategy.dynamic else []

    def histories(self) -> list[ChannelHistory]:
        """Copies of all channel histories, for :meth:`restore`."""
        return [cut.history.clone() for cut in self.cuts]

    def restore(self, histories: list[ChannelHistory] | None) -> None:
        """Put channel histories back, where they change at all; count batches and draw from the start."""
        for cut, history in zip(self.cuts, histories or (), strict=bool(histories)):
            cut.history = history.clone()
        self.running_pass.batch = -1
        self.decider.restart()
