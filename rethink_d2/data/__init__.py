"""Data sets and how they are read."""

from . import classification, glyphs, subsets, voc  # noqa: F401  only registration
