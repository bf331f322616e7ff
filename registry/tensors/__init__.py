"""Tensor mathematics that components share: statistics of channels, moments, reductions, devices."""
