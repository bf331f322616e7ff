"""The built-in evaluators: plugins that measure a model without knowing which strategy ran."""

from .continuation import Continuation
from .cost import Cost
from .decode_latency import DecodeLatency
from .latency import Latency
from .memory import Memory
from .overlap import Overlap
from .perplexity import Perplexity
from .prr import PerformanceRuntimeRatio
from .similarity import Similarity
from .zero_shot import ZeroShot

__all__ = [
    "Continuation",
    "Cost",
    "DecodeLatency",
    "Latency",
    "Memory",
    "Overlap",
    "PerformanceRuntimeRatio",
    "Perplexity",
    "Similarity",
    "ZeroShot",
]
