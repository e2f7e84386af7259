"""PASCAL VOC as the paper uses it."""
