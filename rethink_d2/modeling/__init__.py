"""Backbones and initialization; importing this registers them with Detectron2."""

from . import cascade, classifier, vgg  # noqa: F401  only registration
from .initialization import INITIALIZATION_REGISTRY, describe, initialize
from .resnet import build_scratch_resnet_backbone, build_scratch_resnet_fpn_backbone

__all__ = [
    "INITIALIZATION_REGISTRY",
    "build_scratch_resnet_backbone",
    "build_scratch_resnet_fpn_backbone",
    "describe",
    "initialize",
]
