"""Everything a plugin author imports: roles, sites, statistics, hooks, the catalog and the errors."""

from .catalog import Catalog, Entry, near
from .component import Component
from .errors import DataError, ModelError, NonFiniteError, PluginError, PrunekitError, SpecError, StoreError
from .evaluation import STAGES, Evaluator, Measurement, Stage, Subject
from .hookspecs import ROLES, hookimpl
from .roles import (
    Architecture,
    HistoryMerger,
    MaskApplier,
    ProbeSelector,
    Scorer,
    SiteScores,
    SparsityAllocator,
)
from .sites import AttentionUnit, Producer, Rows, ShapeAttribute, Site, SiteKind
from .statistics import ChannelHistory, Fluctuation, MeanSquare, Statistic, merge_mean, per_row, position_sums
from .strategy import Strategy
from .text import TextSource

__all__ = [
    "ROLES",
    "STAGES",
    "Architecture",
    "AttentionUnit",
    "Catalog",
    "ChannelHistory",
    "Component",
    "DataError",
    "Entry",
    "Evaluator",
    "Fluctuation",
    "HistoryMerger",
    "MaskApplier",
    "MeanSquare",
    "Measurement",
    "ModelError",
    "NonFiniteError",
    "PluginError",
    "ProbeSelector",
    "Producer",
    "PrunekitError",
    "Rows",
    "Scorer",
    "ShapeAttribute",
    "Site",
    "SiteKind",
    "SiteScores",
    "SparsityAllocator",
    "SpecError",
    "Stage",
    "Statistic",
    "StoreError",
    "Strategy",
    "Subject",
    "TextSource",
    "hookimpl",
    "merge_mean",
    "near",
    "per_row",
    "position_sums",
]
