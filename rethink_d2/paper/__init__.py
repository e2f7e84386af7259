"""The paper's experiments as data: which config is which curve, and what was published for it."""

from .manifest import ARMS, Run, find, for_config, load

__all__ = ["ARMS", "Run", "find", "for_config", "load"]
