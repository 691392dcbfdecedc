"""Measures of what a model does."""

from curvlab.evaluation.classification import accuracy, kl_divergence

__all__ = ["accuracy", "kl_divergence"]
