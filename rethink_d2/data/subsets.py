"""Subsets of COCO-format data sets."""
