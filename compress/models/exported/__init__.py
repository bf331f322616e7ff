"""Loading what prunekit exported: its manifest, model classes and checks."""
