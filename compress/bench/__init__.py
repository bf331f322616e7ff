"""``prunekit bench``: how close pruning per batch comes to a model that was sliced beforehand."""
