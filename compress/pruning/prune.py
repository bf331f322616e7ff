"""``prune``: one call that cuts a loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from ...registry import (
    AttentionUnit,
    Catalog,
    DataError,
    PluginError,
    PrunekitError,
    PruneWarning,
    Site,
    SpecError,
    Strategy,
)
from ...registry.checks.sites import check_sites, check_tokens
from ...registry.tensors.tokens import check_token_ids
from ..calibration.covariance import share_out
from ..calibration.losses import check_output_layer
from ..calibration.passes import (
    Progress,
    calibration_list,
    evaluating,
    no_progress,
)
from ..calibration.shared import SharedStatistics
from ..calibration.statistics_file import StatisticsFile
from ..engine.ahead import check_ahead, check_attention
from ..engine.engine import Engine
from ..engine.runtime import Runtime
from ..files.reader import build_architecture, build_runtime, build_strategy
from ..models.given import model_in
from ..models.likeness import ANY, Like, with_types
from ..output.failures import blamed
from ..output.records import Of
from .allocating import check_policy_beforehand
from .deciding import decide
from .matching import DecoderCost, Match, check_reachable
from .pruned import Pruned
from .sites import architectures_in, find_sites, left_whole, misfit, sites_within


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
    of: Of = "units",
    architecture: Like | Mapping[str, Any] | None = None,
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
    ratio has within half a percent is refused (:class:`SpecError`). ``of="decoder"`` is ``match`` for the parameters:
    the ratio is then a share of the decoder's parameters.
    ``architecture``, such as ``{"like": "llama"}``, names the family whose names the layers of a model of an unknown
    type have; the model then runs on a few tokens first, and is refused if a cut is not right (:class:`ModelError`).

    What is worth knowing of the cut is in :attr:`Pruned.notes`, and warned of (:class:`PruneWarning`).

    Raises :class:`SpecError` (options that cannot work), :class:`ModelError` (a model that no adapter knows),
    :class:`DataError` (calibration missing or unusable), :class:`NonFiniteError` (NaN or infinity met); the model
    is then as it was.
    """
    model = model_in(model)
    if of not in get_args(Of):
        raise SpecError(f"of: a ratio is one of {' or '.join(get_args(Of))}, found {of!r:.100}")
    if of == "decoder" and match is None:
        match = Match("parameters")
    catalog = Catalog.discover() if catalog is None else catalog
    if architecture is not None:
        catalog = build_architecture(architecture).only(catalog)
    chosen = build_strategy(catalog, strategy, options)
    catalog = proven(model, catalog, chosen.attention_unit)
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
        if match is None:
            check_policy_beforehand(chosen, [cut.site for cut in engine.cuts], ratio)
        if match is not None and match.what == "parameters":
            cost = DecoderCost.of(model, engine.layers, engine.all_sites, match)
            left = left_whole(model, catalog, chosen.experts)
            check_reachable(cost, [cut.site for cut in engine.cuts], chosen.ratio or 0.0, left)
        batches = None
        if chosen.needs_calibration:
            if calibration is None:
                decides = chosen.decides_by_activations
                who = f"strategy {chosen.name}" if decides else f"compensator {chosen.compensate.name}"
                reads = "takes gradients" if chosen.scores_gradients else "looks at activations"
                reads = "fits something with the model" if chosen.fits else reads
                raise DataError(f"{who} {reads}: give it calibration batches")
            batches = calibration_list(calibration)
            for number, batch in enumerate(batches):
                vocabulary = engine.embeddings.num_embeddings
                check_token_ids(batch["input_ids"], vocabulary, f"calibration batch {number}")
            share_out(engine, batches)
        with torch.inference_mode(False), torch.no_grad(), evaluating(model):
            found = decide(engine, ratio, batches, progress, statistics, match)
            if chosen.dynamic:
                for cut in engine.cuts:
                    cut.history.store(chosen.history)
            engine.start()
        pruned = Pruned(engine, catalog, found)
        for note in pruned.notes:
            warnings.warn(note, PruneWarning, stacklevel=2)
        return pruned
    except BaseException as error:
        engine.remove()
        own = isinstance(error, PrunekitError) or not isinstance(error, Exception)
        message = None if own else blamed(error)
        if message is None:
            raise
        raise PluginError(message) from error


def engine_of(
    model: nn.Module, strategy: Strategy, catalog: Catalog, trace: list | None, runtime: Runtime
) -> tuple[Engine, float | None]:
    """The engine on the model's sites, nothing decided yet, and the share that sites that are not skipped must lose."""
    layers, all_sites = find_sites(model, catalog, strategy.attention_unit, strategy.experts)
    sites, ratio = sites_within(strategy, all_sites, len(cast(Any, model.get_submodule(layers))))
    _check_experts(strategy, all_sites, runtime)
    if runtime.compile is not None and strategy.group_by.splits:
        raise SpecError(
            f"group_by: {strategy.group_by.name} excludes runtime.compile: {runtime.compile}; leave compile out, or "
            "group_by: batch"
        )
    if strategy.probes_with is not None:
        check_attention(model)
    if strategy.decides_ahead:
        check_ahead(model, all_sites)
    return Engine(model, layers, sites, strategy, trace, all_sites, runtime), ratio


def proven(model: nn.Module, catalog: Catalog, unit: AttentionUnit) -> Catalog:
    """The catalog whose architecture serves this model's type, where the user has named one for every model.

    A pass over 12 random tokens must call what the sites name, and compute with half of the units what it computes with
    all while the others weigh nothing. Raises :class:`ModelError` where it does not.
    """
    known = architectures_in(catalog)
    if len(known) != 1 or ANY not in known[0][1].model_types:
        return catalog
    (entry, architecture), whole = known[0], cast(Any, model)
    find_sites(model, catalog, unit)
    ids, served = check_tokens(whole), with_types(catalog, entry, whole.config.model_type)
    try:
        # Fields of the configuration with other names do not matter here: exports that need them say so.
        check_sites(architecture.model_copy(update={"sizes": None}), model, unit)
        with warnings.catch_warnings(), torch.no_grad(), evaluating(model):
            warnings.simplefilter("ignore", PruneWarning)
            logits = [whole(input_ids=ids).logits]
            for applier in ("slice", "zero"):
                with prune(model, "magnitude", ratio=0.5, applier=applier, catalog=served, attention_unit=unit):
                    logits.append(whole(input_ids=ids).logits)
    except (AssertionError, AttributeError, RuntimeError) as error:  # what a block raises that reads another size
        raise misfit(entry, model, error) from error
    dense, sliced, zeroed = logits
    if (sliced - zeroed).norm() > 0.05 * (dense - zeroed).norm():
        raise misfit(entry, model, "without half of its units it computes something else than while they weigh nothing")
    return served


def _check_experts(strategy: Strategy, sites: Sequence[Site], runtime: Runtime) -> None:
    """Raise :class:`SpecError` for what does not work where channels of routed experts are sites."""
    if not any(site.expert is not None for site in sites):
        return
    allocator = strategy.allocator
    for who, found in (
        (f"scorer {strategy.scorer.name}, which takes gradients of a site's matrices", strategy.scores_gradients),
        (f"allocator {allocator.name}, which measures linear layers", allocator.weight_statistic is not None),
        (f"runtime.compile: {runtime.compile}", runtime.compile is not None),
        (
            f"compensator {strategy.compensate.name}, which divides the text into parts by rows or compares the dense "
            "model's inputs with the pruned one's, token by token",
            strategy.compensate.covariance_parts > 1 or strategy.compensate.fits_dense_outputs,
        ),
    ):
        if found:
            raise SpecError(
                f"experts: {who}, does not work for routed experts; leave them whole (experts: keep), or use "
                "another strategy, such as wanda_sp"
            )
