"""``prune``: one call that cuts a loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...registry import (
    Architecture,
    AttentionUnit,
    Catalog,
    ChannelHistory,
    DataError,
    ModelError,
    PruneWarning,
    Site,
    SiteScores,
    SpecError,
    Strategy,
)
from ...registry.catalog import Entry
from ...registry.tensors.tokens import check_token_ids
from ..calibration.blocks import describe_blocks
from ..calibration.covariance import check_layers, choose, finalize, gather_covariances, order_units, share_out
from ..calibration.gradients import gather_gradients
from ..calibration.losses import CutLosses, check_output_layer
from ..calibration.passes import (
    Progress,
    calibrate,
    calibrate_sequentially,
    calibration_list,
    evaluating,
    no_progress,
    one_bar,
)
from ..calibration.shared import SharedStatistics, SomeMoments
from ..calibration.statistics_file import StatisticsFile
from ..calibration.weights import describe_weights
from ..calibration.zeroing import Dropped, channels_without, zeroed
from ..engine.ahead import check_attention, check_same_attention
from ..engine.batch import Decision
from ..engine.engine import Engine
from ..engine.learning import calibrate as learn_statistics
from ..engine.runtime import Runtime
from ..engine.site_cut import SiteCut
from ..files.reader import build_runtime, build_strategy
from ..models.architectures import PRUNED
from ..output.records import MatchFacts
from .matching import Counts, DecoderCost, Match, is_near, nearest, unmatched
from .pruned import Pruned


def prune(
    model: nn.Module,
    strategy: str | Strategy,
    *,
    calibration: Iterable[Any] | None = None,
    trace: bool = False,
    catalog: Catalog | None = None,
    progress: Progress = no_progress,
    statistics: SharedStatistics | StatisticsFile | str | Path | None = None,
    runtime: Runtime | Mapping[str, Any] | None = None,
    match: Match | None = None,
    **options: Any,
) -> Pruned:
    """Prune a loaded causal language model in place; undo with :meth:`Pruned.remove` or ``with``.

    ``strategy`` is a catalogued name (``"pp"``, ``"flap"``, ...) or a :class:`~prunekit.registry.Strategy`;
    ``options`` are the keys of a pipeline file's ``prune`` section (``ratio``, ``skip_layers``, ``scorer``, ...).
    ``calibration`` is an iterable of ``{"input_ids", "attention_mask"}`` tensors (B, T) int64, or of ids alone;
    strategies that look at activations need it. Statistics are float32, whatever the model's dtype; what
    ``statistics`` already holds of them for this very text is not gathered again: a file, which is written where there
    is none, or an object that several prunings of one model share.
    ``runtime`` is a :class:`~prunekit.compress.Runtime`, or a mapping of its options: how to compute, not what.
    With ``match`` the strategy gets the ratio at which the decoder costs ``1 - ratio`` of the dense one; a cost that no
    ratio has within half a percent is refused (:class:`SpecError`).

    What is worth knowing of the cut is in :attr:`Pruned.notes`, and warned of (:class:`PruneWarning`).

    Raises :class:`SpecError` (options that cannot work), :class:`ModelError` (a model that no adapter knows),
    :class:`DataError` (calibration missing or unusable), :class:`NonFiniteError` (NaN or infinity met); the model
    is then as it was.
    """
    catalog = Catalog.discover() if catalog is None else catalog
    chosen = build_strategy(catalog, strategy, options)
    if isinstance(statistics, (str, Path)):
        statistics = StatisticsFile(Path(statistics))
    if isinstance(statistics, StatisticsFile) and chosen.sequential and chosen.needs_calibration:
        raise SpecError(
            f"statistics: strategy {chosen.name} calibrates layer after layer, so its statistics depend on what was "
            f"cut before and serve no other run; leave {statistics.path} out, or set sequential: false"
        )
    how = build_runtime(runtime)
    if trace and how.compile is not None:
        raise SpecError(
            f"runtime.compile: {how.compile} and a trace exclude each other: a trace reads every decision, a compiled "
            "pass runs through; leave one of them out"
        )
    engine, ratio = engine_of(model, chosen, catalog, [] if trace else None, how)
    try:
        check_output_layer(model, chosen)
        batches = None
        if chosen.needs_calibration:
            if calibration is None:
                decides = chosen.decides_by_activations
                who = f"strategy {chosen.name}" if decides else f"compensator {chosen.compensate.name}"
                reads = "takes gradients" if chosen.scores_gradients else "looks at activations"
                raise DataError(f"{who} {reads}: give it calibration batches")
            batches = calibration_list(calibration)
            for number, batch in enumerate(batches):
                vocabulary = engine.embeddings.num_embeddings
                check_token_ids(batch["input_ids"], vocabulary, f"calibration batch {number}")
            share_out(engine, batches)
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            found = _decide(engine, ratio, batches, progress, statistics, match)
            if chosen.dynamic:
                for cut in engine.cuts:
                    cut.history.store(chosen.history)
            engine.start()
        pruned = Pruned(engine, catalog, found)
        for note in pruned.notes:
            warnings.warn(note, PruneWarning, stacklevel=2)
        return pruned
    except BaseException:
        engine.remove()
        raise


def engine_of(
    model: nn.Module, strategy: Strategy, catalog: Catalog, trace: list | None, runtime: Runtime
) -> tuple[Engine, float | None]:
    """The engine on the model's sites, nothing decided yet, and the share that sites that are not skipped must lose."""
    layers, all_sites = find_sites(model, catalog, strategy.attention_unit)
    sites, ratio = sites_within(strategy, all_sites, layers=1 + max(site.layer for site in all_sites))
    if strategy.probes_with is not None:
        check_attention(model)
    if strategy.decides_ahead:
        check_same_attention(model)
    return Engine(model, layers, sites, strategy, trace, all_sites, runtime), ratio


def find_sites(model: nn.Module, catalog: Catalog, unit: AttentionUnit) -> tuple[str, list[Site]]:
    """Path of the decoder layers and all sites, by the architecture that serves the model's type."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model: expected a loaded model, found {model!r:.80}; load it with transformers' "
            "AutoModelForCausalLM.from_pretrained first, or name it in a pipeline file"
        )
    inner = model._modules.get("module")
    if inner is not None and len(model._modules) == 1:
        raise ModelError(
            f"model: a {type(model).__name__} is a wrapper; prune the model inside it, model.module, a "
            f"{type(inner).__name__}, before it is wrapped"
        )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known: list[tuple[Entry, Architecture]] = []
    for entry in catalog.of_role("architectures"):
        made: Any = entry.component
        known.append((entry, made()))
    serving = [(entry, architecture) for entry, architecture in known if kind in architecture.model_types]
    if len(serving) > 1:
        both = " and ".join(f"{entry.name} (plugin {entry.plugin} of {entry.provider})" for entry, _ in serving)
        raise ModelError(f"model type {kind!r} is served by architectures {both}; switch one off with PRUNEKIT_BLOCK")
    if serving:
        _, architecture = serving[0]
        try:
            return architecture.layers, architecture.sites(model, unit)
        except AttributeError as error:
            raise ModelError(
                f"architecture {architecture.name} serves model type {kind!r}, but this {type(model).__name__} is "
                f"built differently ({error}); {_instead(model, architecture.layers)}"
            ) from error
    served = [kind for _, architecture in known for kind in architecture.model_types if not kind.startswith(PRUNED)]
    raise ModelError(
        f"no architecture serves model type {kind!r}; served are {', '.join(served) or 'none'}. "
        f"{_inner_model(model, served)}Write one as a plugin: a prunekit.registry.Architecture with the model's names "
        "(docs/plugins.md)"
    )


_WRAP = (
    "whole = AutoModelForCausalLM.from_config(config), whole.model = backbone, whole.lm_head = output layer; then "
    "prune whole"
)


def _instead(model: nn.Module, layers: str) -> str:
    """What to pass instead of a model without the decoder layers at ``layers``."""
    try:
        model.get_submodule(layers.partition(".")[2])
    except AttributeError:
        return "pass the causal language model itself, without wrappers"
    return f"it is a backbone without an output layer: pass what AutoModelForCausalLM loads, or put it in one ({_WRAP})"


def _inner_model(model: nn.Module, served: Sequence[str]) -> str:
    """A hint for a model that holds a language model of a served type, such as a vision-language model."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is config or text.model_type not in served:
        return ""
    return (
        f"Its {text.model_type} language model can be pruned alone: with config = model.config.get_text_config() "
        f"and backbone = model.model.language_model, {_WRAP}. "
    )


def sites_within(strategy: Strategy, sites: list[Site], layers: int) -> tuple[list[Site], float | None]:
    """Sites of the layers that are not skipped, and the share that they must lose."""
    beyond = [layer for layer in strategy.skip_layers if not 0 <= layer < layers]
    if beyond:
        raise SpecError(f"skip_layers: the model has layers 0 to {layers - 1}, found {beyond[0]}")
    kept_whole = set(strategy.skip_layers)
    inside = [site for site in sites if site.layer not in kept_whole]
    if not strategy.allocator.takes_ratio or not strategy.ratio:
        return inside, strategy.ratio
    others = layers - len(kept_whole)
    if not others:
        raise SpecError(f"skip_layers: all {layers} layers are skipped, so a ratio of {strategy.ratio} is out of reach")
    ratio = strategy.site_ratio(strategy.ratio, layers, len(kept_whole))
    if ratio >= 1:
        raise SpecError(
            f"ratio {strategy.ratio} is out of reach: with {len(kept_whole)} of {layers} layers skipped the others "
            f"would have to lose {ratio:.3g} of their units; skip fewer layers, or ask for less than "
            f"{others / layers:.3g}"
        )
    return inside, ratio


def _decide(
    engine: Engine,
    ratio: float | None,
    batches: list | None,
    progress: Progress,
    statistics: SharedStatistics | StatisticsFile | None,
    match: Match | None,
) -> MatchFacts | None:
    """Calibrate, set every site's count, and let strategies that decide once decide."""
    strategy, allocator = engine.strategy, engine.strategy.allocator
    known = SomeMoments(0)
    if batches is not None and statistics is not None and strategy.compensate.covariance_parts == 1:
        known = statistics.moments(batches)
    numbers: AbstractContextManager[MutableMapping[str, float]] = nullcontext({})
    looks = allocator.measures or allocator.block_statistic is not None or allocator.weight_statistic is not None
    if looks and statistics is not None and batches is not None:
        numbers = statistics.measured(engine, batches)
    *earlier, _ = strategy.schedule(ratio or 0.0)
    with numbers as measured:
        with one_bar(progress, 1 + len(earlier)) as in_steps:
            if batches is not None:
                _learn(engine, batches, progress, in_steps, statistics, known)
                describe_blocks(engine, batches, measured, progress)
            describe_weights(engine, batches, measured, progress)
            for target in earlier:
                _allocate(engine, target, batches, measured, progress, None)
                if batches is not None:
                    _learn_again(engine, batches, in_steps)
        found = _allocate(engine, ratio, batches, measured, progress, match)
    if strategy.sequential and batches is not None:
        _decide_by_layer(engine, batches, progress)
        return found
    for cut in engine.cuts:
        if not strategy.dynamic or not cut.count:
            _fix(engine, cut)
    if batches is not None and strategy.compensate.needs_covariance:
        gather_covariances(engine, batches, progress, known)
    return found


def _learn(
    engine: Engine,
    batches: list,
    progress: Progress,
    in_steps: Progress,
    statistics: SharedStatistics | StatisticsFile | None,
    known: SomeMoments,
) -> None:
    """Fill every site with what the dense model shows: what its scorer reads, and the means that compensation needs.

    ``in_steps`` is the progress of what is repeated where units are chosen in several steps. ``known``: covariances.
    """
    strategy = engine.strategy
    if strategy.scores_gradients and not strategy.allocator.whole_blocks:
        gather_gradients(engine, batches, in_steps, {} if statistics is None else statistics.gradients(batches))
        if not strategy.compensates and not isinstance(statistics, StatisticsFile):
            return
    else:
        progress = in_steps
    if strategy.sequential and not strategy.allocator.needs_scores:
        return
    if strategy.calibrates_channels and statistics is not None:
        statistics.calibrate(engine, batches, progress)
    elif strategy.calibrates_channels:
        calibrate(engine, batches, progress)
    if strategy.chooser is not None and not strategy.allocator.whole_blocks:
        order_units(engine, batches, progress, known)


def _learn_again(engine: Engine, batches: list, progress: Progress) -> None:
    """Fill every site with what its scorer reads in the model with dropped units zero; means stay the dense ones."""
    dropped: Dropped = {
        cut: channels_without(cut, engine.decider.calibrated_units(cut)) if cut.count else None
        for cut in engine.cuts
        if not cut.whole
    }
    dense = [cut.history for cut in engine.cuts]
    with zeroed(dropped):
        if engine.strategy.scores_gradients:
            gather_gradients(engine, batches, progress, {})
            return
        for cut in engine.cuts:
            cut.state.replace_history(ChannelHistory(cut.site.channels, cut.history.device))
        calibrate(engine, batches, progress)
    for cut, history in zip(engine.cuts, dense, strict=True):
        cut.state.replace_history(replace(cut.history, mean=history.mean, tokens=history.tokens))


def _decide_by_layer(engine: Engine, batches: list, progress: Progress) -> None:
    """Calibrate, choose, cut and compensate layer after layer, with the counts that sites have."""
    strategy, cuts = engine.strategy, engine.cuts
    dense: dict[SiteCut, Tensor] = {}
    """What enters a site's consumer in the dense model, for the batch that passes now."""
    for cut in cuts:  # statistics of the dense model have served the allocator
        cut.state.replace_history(ChannelHistory(cut.site.channels, cut.history.device))

    def learn_dense(cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        if not cut.whole:
            dense[cut] = x

    def learn(cut: SiteCut, x: Tensor, valid: Tensor | None) -> None:
        learn_statistics(cut.state, x, valid)
        if strategy.needs_covariance and not cut.whole:
            cut.compensation.learn(x, valid, dense.pop(cut, None))

    def decide_layer(layer: int) -> None:
        for cut in cuts:
            if cut.site.layer == layer:
                if not cut.whole:
                    choose(engine, cut)
                _fix(engine, cut)
                if strategy.compensate.needs_covariance and not cut.whole:
                    finalize(engine, cut)
                cut.compensation.forget()

    if strategy.needs_covariance:
        check_layers(cuts)
    fits_dense = strategy.compensate.fits_dense_outputs
    calibrate_sequentially(engine, batches, learn, decide_layer, progress, learn_dense if fits_dense else None)


def _allocate(
    engine: Engine,
    ratio: float | None,
    batches: list | None,
    known: MutableMapping[str, float],
    progress: Progress,
    match: Match | None,
) -> MatchFacts | None:
    """Set every site's count: for ``ratio``, or for the one whose decoder costs what ``match`` asks, which is returned.

    Raises :class:`SpecError` where no ratio has that cost.
    """
    strategy, cuts = engine.strategy, engine.cuts
    allocator: Any = strategy.allocator
    scores = [cut.state.unscored for cut in cuts]
    if allocator.needs_scores or (allocator.uses_scores and all(cut.state.has_scores for cut in cuts)):
        scores = [engine.decider.scores(cut) for cut in cuts]
    measured: list[CutLosses] = []

    def counts_at(ratio: float) -> Counts:
        own = strategy.model_copy(update={"ratio": ratio})
        share = sites_within(own, list(engine.all_sites), len(engine.layers))[1]
        return _counts(allocator, scores, share, measured)

    if allocator.measures and batches is not None:
        measured.append(CutLosses(engine, batches, known, progress))
        engine.searched = measured[0].records
    if match is None:
        found, counts = None, _counts(allocator, scores, ratio, measured)
    else:
        asked = strategy.ratio or 0.0
        found = nearest(match, DecoderCost.of(engine.model, engine.layers, engine.all_sites, match), counts_at, asked)
        if not (allocator.whole_blocks or is_near(found, asked)):  # blocks come no nearer than their size
            raise unmatched(strategy.name, found, asked)
        counts = counts_at(found.ratio)
    for cut in cuts:
        cut.state.keep(counts[cut.site.layer, cut.site.kind])
    return found


def _counts(allocator: Any, scores: Sequence[SiteScores], ratio: float | None, measured: Sequence[CutLosses]) -> Counts:
    """The allocator's counts by layer and kind; raises :class:`SpecError` where they are not those of the sites.

    ``measured``: the losses of cuts, for an allocator that measures them; else nothing.
    """
    for losses in measured:
        losses.records.clear()  # of another ratio
    counts = allocator.allocate(scores, ratio or 0.0, *measured) if scores else []
    if len(counts) != len(scores):
        raise SpecError(
            f"allocator {allocator.name} returned {len(counts)} counts for {len(scores)} sites; it must return "
            "one for each site; fix the plugin"
        )
    for each, count in zip(scores, counts, strict=True):
        if not 0 <= count <= each.site.units:
            raise SpecError(
                f"allocator {allocator.name} keeps {count} of {each.site.units} units at {each.site.label}; "
                "it must keep between 0 and all"
            )
        if allocator.whole_blocks and 0 < count < each.site.units:
            raise SpecError(
                f"allocator {allocator.name} keeps {count} of {each.site.units} units at {each.site.label}, and says "
                "that sites keep all or nothing (whole_blocks); fix the plugin"
            )
    return {(each.site.layer, each.site.kind): int(count) for each, count in zip(scores, counts, strict=True)}


def _fix(engine: Engine, cut: SiteCut) -> None:
    """Decide once for a site, by its calibrated scores."""
    kept = engine.decider.calibrated_units(cut)
    nothing = torch.empty(0, dtype=torch.int64)
    engine.hooks.record(cut, Decision(kept, nothing, nothing), None)
    if not cut.whole:
        cut.state.fix(kept)
        if engine.strategy.sequential:
            cut.open(kept, stays=True)
