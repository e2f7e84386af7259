"""Data sets and how they are read."""

from . import classification, fast_mapper, glyphs, subsets, voc  # noqa: F401  only registration
