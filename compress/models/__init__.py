"""Models from anywhere: families, loading, devices, and models that prunekit exported."""
