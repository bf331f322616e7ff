"""What plugins are made of: roles, sites, statistics, hooks, the catalog and the errors (docs/public-names.md)."""

from .catalog import Catalog, Entry, near
from .component import Component
from .errors import (
    DataError,
    ModelError,
    NonFiniteError,
    PluginError,
    PrunekitError,
    PruneWarning,
    SingularError,
    SpecError,
    StoreError,
)
from .roles.choosing import Chooser, Order
from .roles.compensation import Compensator, MemoryPlan, NoCompensation, Prepared, SiteCovariance, Slope
from .roles.evaluation import STAGES, Evaluator, Measurement, PlainSubject, Stage, Subject
from .roles.exporting import ExportFormat
from .roles.fitting import FittedScorer
from .roles.gradients import GradientScorer, GroupPart, MatrixGradient
from .roles.grouping import Grouping, OneForAll
from .roles.hookspecs import PLUGIN_API, ROLES, hookimpl
from .roles.parts import (
    MEASURED_LENGTH,
    Architecture,
    Evaluate,
    HistoryMerger,
    MaskApplier,
    Objective,
    ProbeSelector,
    Scorer,
    Selection,
    SiteScores,
    SizeFields,
    SparsityAllocator,
)
from .roles.policies import PerPrompt, Policy
from .roles.strategy import PaddingOf, Strategy
from .sites import (
    AttentionUnit,
    ExpertUnit,
    Producer,
    Rows,
    ShapeAttribute,
    Site,
    SiteGroup,
    SiteKind,
    UnitArgument,
    UnitTensor,
    complement,
)
from .tensors.blocks import BlockInfluence, BlockStatistic
from .tensors.experts import ExpertLinear, expert_linears, expert_sites, linear_at
from .tensors.history_storage import HistoryStorage
from .tensors.moments import ChannelMoments
from .tensors.reductions import position_means, position_sums, token_norms
from .tensors.statistics import ChannelHistory, ExpertStatistic, Fluctuation, MeanSquare, Statistic, merge_mean, per_row
from .tensors.weights import LayerWeight, WeightStatistic
from .text import TextSource

__all__ = [
    "MEASURED_LENGTH",
    "PLUGIN_API",
    "ROLES",
    "STAGES",
    "Architecture",
    "AttentionUnit",
    "BlockInfluence",
    "BlockStatistic",
    "Catalog",
    "ChannelHistory",
    "ChannelMoments",
    "Chooser",
    "Compensator",
    "Component",
    "DataError",
    "Entry",
    "Evaluate",
    "Evaluator",
    "ExpertLinear",
    "ExpertStatistic",
    "ExpertUnit",
    "ExportFormat",
    "FittedScorer",
    "Fluctuation",
    "GradientScorer",
    "GroupPart",
    "Grouping",
    "HistoryMerger",
    "HistoryStorage",
    "LayerWeight",
    "MaskApplier",
    "MatrixGradient",
    "MeanSquare",
    "Measurement",
    "MemoryPlan",
    "ModelError",
    "NoCompensation",
    "NonFiniteError",
    "Objective",
    "OneForAll",
    "Order",
    "PaddingOf",
    "PerPrompt",
    "PlainSubject",
    "PluginError",
    "Policy",
    "Prepared",
    "ProbeSelector",
    "Producer",
    "PruneWarning",
    "PrunekitError",
    "Rows",
    "Scorer",
    "Selection",
    "ShapeAttribute",
    "SingularError",
    "Site",
    "SiteCovariance",
    "SiteGroup",
    "SiteKind",
    "SiteScores",
    "SizeFields",
    "Slope",
    "SparsityAllocator",
    "SpecError",
    "Stage",
    "Statistic",
    "StoreError",
    "Strategy",
    "Subject",
    "TextSource",
    "UnitArgument",
    "UnitTensor",
    "WeightStatistic",
    "complement",
    "expert_linears",
    "expert_sites",
    "hookimpl",
    "linear_at",
    "merge_mean",
    "near",
    "per_row",
    "position_means",
    "position_sums",
    "token_norms",
]
