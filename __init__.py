"""prunekit: structured pruning of language models with pluggable strategies."""

__version__ = "0.1.0"
