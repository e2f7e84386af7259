"""What a model consists of: its parts, their normalization, what is frozen."""

from collections import Counter

import torch
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import build_model
from torch import nn

# Which key sets the normalization of which part of the model; the backbone's own depends on its type.
NORM_KEYS = {
    "backbone.fpn": "MODEL.FPN.NORM",
    "roi_heads.res5": "MODEL.RESNETS.NORM",
    "roi_heads.box_head": "MODEL.ROI_BOX_HEAD.NORM",
    "roi_heads.mask_head": "MODEL.ROI_MASK_HEAD.NORM",
}


def norm_kind(module):
    """Name the normalization that a module is.

    Args:
        module (nn.Module): any module.

    Returns:
        str or None: as in Detectron2's NORM keys; None for other modules.
    """
    if isinstance(module, NaiveSyncBatchNorm):
        return "naiveSyncBN_N" if getattr(module, "_stats_mode", "") == "N" else "naiveSyncBN"
    for kind, cls in (
        ("SyncBN", nn.SyncBatchNorm),
        ("FrozenBN", FrozenBatchNorm2d),
        ("BN", nn.modules.batchnorm._BatchNorm),
        ("GN", nn.GroupNorm),
        ("LN", nn.LayerNorm),
    ):
        if isinstance(module, cls):
            return kind
    return None


def part_of(name):
    """The part of a detector that a module belongs to, such as "backbone.fpn" or "roi_heads.box_head"."""
    head, *rest = name.split(".")
    if head == "backbone":
        second = rest[0] if rest else ""
        return (
            f"{head}.fpn"
            if second.startswith("fpn")
            else f"{head}.{second}"
            if second == "bottom_up"
            else head
        )
    return ".".join([head, *rest[:1]]) if head == "roi_heads" else head


def norms(model):
    """Count the normalization layers of a model.

    Args:
        model (nn.Module): a detector.

    Returns:
        dict[str, Counter]: for every part (see :func:`part_of`), how many layers of which kind.
    """
    parts = {}
    for name, module in model.named_modules():
        kind = norm_kind(module)
        if kind:
            parts.setdefault(part_of(name), Counter())[kind] += 1
    return parts


def build_meta(cfg):
    """Build the configured model without memory for its parameters.

    Args:
        cfg (CfgNode): a config.

    Returns:
        nn.Module: on the meta device, or on the CPU where a component cannot do without values.
    """
    for device in ("meta", "cpu"):
        copy = cfg.clone()
        copy.defrost()
        copy.MODEL.DEVICE = device
        try:
            with torch.device(device):
                return build_model(copy)
        except (NotImplementedError, RuntimeError):
            if device == "cpu":
                raise


def frozen_modules(model):
    """Find the largest modules none of whose parameters trains.

    Args:
        model (nn.Module): any model.

    Returns:
        dict[str, int]: number of parameters by module name.
    """
    found = {}
    for name, module in model.named_modules():
        params = list(module.parameters())
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and params and not inside and not any(p.requires_grad for p in params):
            found[name] = sum(p.numel() for p in params)
    return found
