"""Training: one run, from a resolved config to its run folder."""

from .trainer import Trainer

__all__ = ["Trainer"]
