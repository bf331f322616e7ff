"""Models that prunekit exported: the manifest and the model classes."""
