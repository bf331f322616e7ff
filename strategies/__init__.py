"""The built-in strategies and their parts: plugins, written exactly as third-party plugins are."""

from .allocation import Explicit, MlpOnly, Uniform
from .application import Slice, Zero
from .cfsp import Cfsp, CfspScorer
from .compensation import LeastSquares, LowRankLeastSquares, Mean, ProbedMean, ProbeMean
from .depth import BlockByBlock, BlockPruner, LowestInfluence, ShortGPT, Sleb
from .evolutionary import Evolutionary
from .flap import Flap
from .flap.adaptive import GlobalAdaptive
from .flap.scorer import FluctuationScorer
from .gisp import Gisp, GispScorer
from .global_ranking import GlobalRanking
from .greedy import Greedy
from .griffin import Bwap, BwapScorer, Glass, Griffin, GriffinScorer, RankMerge
from .grouping import ByLikeness, ByRow
from .layers import AlphaPruning, InfluenceShares, LayerShares, LogIncremental, Owl
from .llm_pruner import LlmPruner, TaylorScorer
from .lora_prune import LoRAPrune, LoRAPruneScorer
from .magnitude import Magnitude, MagnitudeScorer
from .modegpt import ModegptChooser
from .obs import Obs, ObsChooser
from .policies import DecodeOnly, Drift, EveryN, PrefillOnly
from .pp import PP, FullBatchProbing, ProbePruning
from .pp.mergers import FixedRatio, HistoryOnly, ImportanceScaled, MovingAverage, ProbeOnly
from .pp.scorer import PPsp
from .pp.selectors import HiddenNorm, RandomProbe, ResidualNorm, SpreadProbe, WholeBatch
from .pp_ls import PPLeastSquares
from .random import Random, RandomScorer
from .reap import ExpertFrequency, ExpertFrequencyScorer, Reap, ReapScorer
from .reconstruct import Reconstruct
from .reference.flap import FlapReference, FlapReferenceAllocator, FlapReferenceScorer, Wifn
from .reference.pp import PPReference, PPReferenceFixedRatio, PPReferenceFullBatch, PPReferenceWandaSp
from .reference.pp_flap import PPReferenceFlap, PPReferenceFlapAllocator, PPReferenceFlapScorer
from .sensitivity import Sensitivity
from .two_ssp import TwoSsp, TwoSspScorer
from .wanda_sp import WandaSp, WandaSpScorer

__all__ = [
    "PP",
    "AlphaPruning",
    "BlockByBlock",
    "BlockPruner",
    "Bwap",
    "BwapScorer",
    "ByLikeness",
    "ByRow",
    "Cfsp",
    "CfspScorer",
    "DecodeOnly",
    "Drift",
    "EveryN",
    "Evolutionary",
    "ExpertFrequency",
    "ExpertFrequencyScorer",
    "Explicit",
    "FixedRatio",
    "Flap",
    "FlapReference",
    "FlapReferenceAllocator",
    "FlapReferenceScorer",
    "FluctuationScorer",
    "FullBatchProbing",
    "Gisp",
    "GispScorer",
    "Glass",
    "GlobalAdaptive",
    "GlobalRanking",
    "Greedy",
    "Griffin",
    "GriffinScorer",
    "HiddenNorm",
    "HistoryOnly",
    "ImportanceScaled",
    "InfluenceShares",
    "LayerShares",
    "LeastSquares",
    "LlmPruner",
    "LoRAPrune",
    "LoRAPruneScorer",
    "LogIncremental",
    "LowRankLeastSquares",
    "LowestInfluence",
    "Magnitude",
    "MagnitudeScorer",
    "Mean",
    "MlpOnly",
    "ModegptChooser",
    "MovingAverage",
    "Obs",
    "ObsChooser",
    "Owl",
    "PPLeastSquares",
    "PPReference",
    "PPReferenceFixedRatio",
    "PPReferenceFlap",
    "PPReferenceFlapAllocator",
    "PPReferenceFlapScorer",
    "PPReferenceFullBatch",
    "PPReferenceWandaSp",
    "PPsp",
    "PrefillOnly",
    "ProbeMean",
    "ProbeOnly",
    "ProbePruning",
    "ProbedMean",
    "Random",
    "RandomProbe",
    "RandomScorer",
    "RankMerge",
    "Reap",
    "ReapScorer",
    "Reconstruct",
    "ResidualNorm",
    "Sensitivity",
    "ShortGPT",
    "Sleb",
    "Slice",
    "SpreadProbe",
    "TaylorScorer",
    "TwoSsp",
    "TwoSspScorer",
    "Uniform",
    "WandaSp",
    "WandaSpScorer",
    "WholeBatch",
    "Wifn",
    "Zero",
]
