"""Summarises trials by configuration: mean and deviation over seeds, dense models, and the best of each block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import pandas as pd

from ..files.dotted import flatten, resolved_settings
from .axes import RATIO, USE, called, is_method, is_protocol, is_repetition, key, named_text, setting_text
from .metrics import KNOWN, Metric, all_metrics, find, main_metrics
from .statistics import Sample
from .trials import Study, Trial

ABOVE_DENSE = ("full_batch_probing",)
"""Strategies that compute more than the dense model at any ratio."""

PRUNING = ("prune.", "calibration.", "recover")
"""Prefixes of settings that a dense model does not have."""

NOT_CHOSEN = re.compile(r"(processor|threads|torch|accelerator|sites)$|.*seed$|(dense|pruned)_")
"""Protocol keys of the machine, of seeds, of repeated measured values, and of what a pruned model left to measure."""

NOTHING_SAVED = "no time saved"
"""How the note of a missing PRR begins."""


@dataclass(frozen=True)
class Cell:
    """One metric of one configuration over its seeds, or of a dense model."""

    metric: Metric
    text: str
    mean: float | None = None
    sd: float | None = None
    """Standard deviation over seeds (n - 1); None for fewer than two different values."""
    count: int = 0
    """Seeds that have a value."""
    planned: int = 0

    @property
    def complete(self) -> bool:
        """Whether every planned seed has a value."""
        return self.count == self.planned


@dataclass
class Configuration:
    """Trials that differ only in their seeds."""

    number: int
    settings: dict[str, Any]
    trials: list[Trial] = field(default_factory=list)
    """The finished ones."""
    places: list[int] = field(default_factory=list)
    """Their rows in the study's frame."""
    planned: int = 0
    """The number of trials, unfinished ones included."""
    reference: int = 0
    """Index of the dense model that it compares with."""

    @property
    def first(self) -> Trial:
        return self.trials[0]

    @property
    def strategy(self) -> str:
        return self.first.result.strategy if self.first.result else ""

    @property
    def ratio(self) -> float | None:
        """The requested ratio, else the share of units cut."""
        ratio = self.first.result.ratio if self.first.result else None
        return None if ratio is None else ratio.units_cut if ratio.asked is None else ratio.asked

    def kept(self, kind: str) -> list[float | None]:
        """Share of units kept in each layer, mean over seeds; None for a layer without such a site."""
        layers = zip(*(trial.result.layers for trial in self.trials if trial.result), strict=False)
        sites = [[layer.sites[kind] for layer in versions if kind in layer.sites] for versions in layers]
        return [fmean(site.kept / site.units for site in versions) if versions else None for versions in sites]


@dataclass
class Dense:
    """A model before pruning, as measured in some of the trials."""

    settings: dict[str, Any]
    """What distinguishes it from the study's other dense models."""
    trials: list[Trial]
    places: list[int]


@dataclass(eq=False)
class Summary:
    """The configurations of a study and their values."""

    study: Study
    metrics: list[Metric]
    """Those of the main table."""
    axes: list[str]
    """The settings that vary, without seeds."""
    configurations: list[Configuration]
    """Ordered by dense model and ratio, otherwise as planned."""
    dense: list[Dense]
    repeated: list[str]
    """The axes that repeat the measurement."""

    def metric(self, asked: str) -> Metric | None:
        return find(self.metrics, asked)

    @property
    def quality(self) -> list[Metric]:
        return [metric for metric in self.metrics if metric.quality]

    @property
    def shown_axes(self) -> list[str]:
        """The axes with a column: those that vary, else strategy and ratio."""
        return self.axes or [name for name in (USE, RATIO) if any(name in c.settings for c in self.configurations)]

    @cached_property
    def methods(self) -> list[str]:
        """The axes that vary how a model is pruned; their combinations compete."""
        return [name for name in self.axes if is_method(name, self.study.text)]

    @cached_property
    def conditions(self) -> list[str]:
        """The axes, besides the ratio, in which competing configurations must agree.

        Those that are not methods; in a study without methods, those of the evaluation.
        """
        if self.methods:
            return [name for name in self.axes if name not in (RATIO, *self.methods)]
        return [name for name in self.axes if is_protocol(name, self.study.text)]

    def name(self, configuration: Configuration, axes: Sequence[str] | None = None, *more: str) -> str:
        """The settings that vary, ``PP (40%, other)``, and ``more`` about it."""
        names = self.shown_axes if axes is None else axes
        texts = [named_text(name, configuration.settings[name]) for name in names if name in configuration.settings]
        return called(texts or [setting_text(USE, configuration.strategy)], *more)

    def dense_name(self, reference: int) -> str:
        """``dense``, followed by what distinguishes it from other dense models."""
        settings = self.dense[reference].settings
        return called(["dense", *(named_text(name, value) for name, value in settings.items())])

    def sample(self, configuration: Configuration, metric: Metric) -> Sample:
        """The trials with their values, for tests."""
        return Sample(configuration.trials, self._values[metric].loc[configuration.places].tolist())

    def cell(self, configuration: Configuration, metric: Metric) -> Cell:
        """Mean and standard deviation over the seeds."""
        mean, sd, count = (part[metric][configuration.number] for part in self._moments)
        planned = max(configuration.planned, len(configuration.trials))
        if not count:
            return Cell(metric, self._absent(configuration, metric), planned=planned)
        spread = None if sd != sd else float(sd)
        text = metric.text(mean) if spread is None else metric.spread(mean, spread)
        if count < planned:
            text += f" ({count} of {planned})"
        return Cell(metric, text, float(mean), spread, int(count), planned)

    def dense_cell(self, reference: int, metric: Metric) -> Cell:
        """The dense model's value: the median of repeated measurements."""
        frame = self.study.frame.loc[self.dense[reference].places]
        values = metric.dense(frame)
        if values.notna().any():
            return Cell(metric, metric.text(float(values.median())), float(values.median()))
        raw = frame["dense", metric.key].dropna() if ("dense", metric.key) in frame and not metric.relative else ()
        return Cell(metric, metric.text(next(iter(raw), None)))

    def mean(self, configuration: Configuration, metric: Metric | None) -> float | None:
        return self.cell(configuration, metric).mean if metric else None

    def saves(self, configuration: Configuration) -> bool:
        """Whether it computes less than the dense model: as measured, else as known of its strategy."""
        flops = self.mean(configuration, self.metric("cost.flops_ratio"))
        return configuration.strategy not in ABOVE_DENSE if flops is None else flops < 1

    def blocks(self) -> list[list[Configuration]]:
        """Configurations that compete: same dense model, ratio and conditions."""
        found: dict[Any, list[Configuration]] = {}
        for c in self.configurations:
            found.setdefault((c.reference, c.ratio, key([c.settings.get(n) for n in self.conditions])), []).append(c)
        return list(found.values())

    @cached_property
    def _values(self) -> pd.DataFrame:
        """Finite values by trial and metric."""
        metrics = dict.fromkeys([*self.metrics, *all_metrics(self.study)])
        return pd.DataFrame({metric: metric.pruned(self.study.frame) for metric in metrics})

    @cached_property
    def _moments(self) -> list[dict[Any, Any]]:
        """Mean, standard deviation and count, by metric and configuration."""
        owner = {place: c.number for c in self.configurations for place in c.places}
        groups = self._values.groupby(self._values.index.map(owner))
        varies = groups.nunique() > 1
        # Equal values are kept as they are: their mean may differ in the last digit.
        parts = (groups.mean().where(varies, groups.first()), groups.std().where(varies), groups.count())
        return [part.to_dict() for part in parts]

    def _absent(self, configuration: Configuration, metric: Metric) -> str:
        """What stands for a missing number: the text measured instead, or why there is none."""
        if not metric.relative and ("pruned", metric.key) in self.study.frame:
            raw = self.study.frame["pruned", metric.key].loc[configuration.places].dropna().tolist()
            if raw:
                return metric.text(raw[0])
        found = [trial.metric(metric.label) for trial in configuration.trials]
        return NOTHING_SAVED if any(NOTHING_SAVED in note for one in found if one for note in one.notes) else "-"


def summarise(study: Study) -> Summary:
    """Gather the trials of a study by configuration."""
    names = list(dict.fromkeys(name for trial in study.trials for name in trial.settings))
    names = [*(name for name in study.axes if name in names), *(name for name in names if name not in study.axes)]
    repeated = [name for name in names if is_repetition(name)]
    configurations = _configurations(study, names, repeated)
    # Settings of unfinished trials count: they were planned to vary.
    planned = {name: {key(t.settings[name]) for t in study.trials if name in t.settings} for name in names}
    axes = [
        name
        for name in names
        if name not in repeated
        and (len({key(c.settings.get(name)) for c in configurations}) > 1 or len(planned[name]) > 1)
    ]
    for configuration in () if axes else configurations:  # nothing varies: strategy and ratio name the row
        asked = {} if configuration.ratio is None else {RATIO: configuration.ratio}
        configuration.settings = {USE: configuration.strategy, **asked, **configuration.settings}
    dense = _compare_with_dense(study, configurations, axes)
    configurations.sort(key=lambda c: (c.reference, c.ratio or 0.0))
    seeds = [name for name in repeated if len(planned[name]) > 1]
    return Summary(study, main_metrics(study), axes, configurations, dense, seeds)


def _configurations(study: Study, names: Sequence[str], repeated: Sequence[str]) -> list[Configuration]:
    """The configurations with at least one finished trial; unfinished trials count as planned."""
    found: dict[str, Configuration] = {}
    homes: dict[str, Configuration] = {}

    def plan(trial: Trial) -> str:
        return key({name: value for name, value in trial.settings.items() if name not in repeated})

    for place, trial in enumerate(study.trials):
        if trial.result is None:
            continue
        resolved = resolved_settings(trial.resolved) if len(trial.settings) < len(names) else {}
        known = {**{name: resolved[name] for name in names if name in resolved}, **trial.settings}
        settings = {name: known[name] for name in names if name in known and name not in repeated}
        home = found.setdefault(key(settings), Configuration(len(found), settings))
        home.trials.append(trial)
        home.places.append(place)
        homes[plan(trial)] = home
    for trial in study.trials:
        home = homes.get(plan(trial)) or found.get(plan(trial)) or Configuration(-1, {})
        home.planned += 1
    return list(found.values())


def _compare_with_dense(study: Study, configurations: Sequence[Configuration], axes: Sequence[str]) -> list[Dense]:
    """The dense models; sets the reference of every configuration."""
    groups, dense = _dense_groups(configurations), []
    for index, group in enumerate(groups):
        settings = {name: group[0].settings[name] for name in axes if _distinguishes(name, index, groups)}
        # A dense model has no pruning settings, unless nothing else distinguishes two.
        own = {n: v for n, v in settings.items() if not is_method(n, study.text) and not n.startswith(PRUNING)}
        for member in group:
            member.reference = index
        trials = [trial for member in group for trial in member.trials]
        dense.append(Dense(own or settings, trials, [place for member in group for place in member.places]))
    return dense


def _dense_groups(configurations: Sequence[Configuration]) -> list[list[Configuration]]:
    """Configurations that compare with the same dense model, ordered by the first one.

    They have the same model fingerprint, and the same protocols of all evaluators that two of them ran. One that lacks
    an evaluator joins a group that has it, the one with the most similar settings. Keys that differ between the trials
    of one configuration depend on the seed and are ignored.
    """
    facts = [[_dense_facts(trial) for trial in c.trials] for c in configurations]
    last = [{place: text for each in trials for place, text in each.items()} for trials in facts]
    pairs = [(own, each) for own, trials in zip(last, facts, strict=True) for each in trials]
    by_seed = {place for own, each in pairs for place, text in each.items() if own[place] != text}
    known = []
    for own in last:
        labels: dict[str, dict[str, str]] = {}
        for (label, name), text in own.items():
            labels.setdefault(label, {}).update({} if (label, name) in by_seed else {name: text})
        known.append({label: key(protocol) for label, protocol in labels.items()})
    settings = [{(name, key(value)) for name, value in c.settings.items()} for c in configurations]
    groups: list[tuple[list[int], dict[str, str]]] = []
    # Configurations with most evaluators first: they determine what the others can join.
    for index in sorted(range(len(known)), key=lambda i: -len(known[i])):
        mine = known[index]
        fitting = [group for group in groups if all(group[1].get(label, text) == text for label, text in mine.items())]
        if not fitting:
            groups.append(([], {}))
            fitting = groups[-1:]
        similar = [max((len(settings[index] & settings[m]) for m in members), default=0) for members, _ in fitting]
        members, protocols = fitting[similar.index(max(similar))]
        members.append(index)
        protocols.update({**mine, **protocols})
    return [[configurations[index] for index in members] for members in sorted(sorted(group[0]) for group in groups)]


def _dense_facts(trial: Trial) -> dict[tuple[str, str], str]:
    """All that identifies the trial's dense model, by evaluator and key; an empty label is the model itself."""
    model = trial.result.model if trial.result else None
    facts = {("", ""): key((model.fingerprint or model.name) if model else None)}
    for metric in trial.metrics:
        start, protocol = f"evaluate.{metric.label}.", dict(metric.protocol)
        if metric.evaluator not in KNOWN:  # a plugin's protocol may contain results; its options are certain choices
            options = resolved_settings(trial.resolved)
            protocol = {k.removeprefix(start): value for k, value in options.items() if k.startswith(start)}
        facts[metric.label, ""] = ""
        for name, value in flatten(protocol).items():
            if not NOT_CHOSEN.match(name.rpartition(".")[2]):
                facts[metric.label, name] = key(re.sub(r", seed \d+$", "", value) if isinstance(value, str) else value)
    return facts


def _distinguishes(name: str, index: int, groups: Sequence[Sequence[Configuration]]) -> bool:
    """Whether an axis has one value in a group and other values elsewhere."""
    values = [{key(member.settings.get(name)) for member in group} for group in groups]
    others = set().union(*(found for i, found in enumerate(values) if i != index))
    if len(groups) < 2 or len(values[index]) > 1 or name not in groups[index][0].settings:
        return False
    return not values[index] & others if any(len(found) > 1 for found in values) else bool(others - values[index])
