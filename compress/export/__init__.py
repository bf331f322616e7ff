"""Pruned models as folders that reload: what can be written, and where it runs."""
