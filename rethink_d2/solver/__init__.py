"""Lengths of training and learning rates."""

from .schedule import IterationLR, Schedule, build_lr_scheduler, multiplier, parse

__all__ = ["IterationLR", "Schedule", "build_lr_scheduler", "multiplier", "parse"]
