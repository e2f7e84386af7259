"""Data sets and how they are read."""

from . import glyphs  # noqa: F401  only registration
