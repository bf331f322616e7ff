"""``prunekit demo``."""
