"""Ablation studies: a pipeline with fields varied, every trial stored as it ends."""
