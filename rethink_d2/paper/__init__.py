"""The paper's experiments as data: which config is which curve, and what was published for it."""

from .manifest import Run, find, for_config, load

__all__ = ["Run", "find", "for_config", "load"]
