"""Evaluation of detectors by the metric that belongs to a data set."""

from .evaluate import evaluate

__all__ = ["evaluate"]
