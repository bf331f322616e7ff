"""Prune a loaded model: the call, its handle, and freezing a dynamic strategy."""
