"""Faster steps, each by one key of SOLVER.ACCELERATE; the paper's configs use none of them.

All of them change the order of floating-point sums, so a run with one is another run (its identity
differs), but what they compute is the same within float tolerance. COMPILE_PAD also pads images further,
which under group norm changes the statistics.
"""

import logging
import shutil

import torch
from detectron2.modeling import Backbone

__all__ = ["accelerate", "set_sgd_implementation"]

logger = logging.getLogger(__name__)

SGD = ("", "foreach", "fused")


def accelerate(model, options):
    """Apply CHANNELS_LAST and COMPILE to a model, in place.

    Args:
        model (nn.Module): not wrapped for several processes yet; names of its state stay as they are.
        options (CfgNode): SOLVER.ACCELERATE.

    Returns:
        nn.Module: the same model.
    """
    if options.CHANNELS_LAST:
        # Convolutions hand the format of their weights on to what follows.
        model.to(memory_format=torch.channels_last)
    if options.COMPILE_PAD and _can_compile():
        backbone = model.backbone
        _pad_to(backbone, options.COMPILE_PAD)
        backbone.compile(dynamic=False)
    return model


def _can_compile():
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        return True
    logger.warning("SOLVER.ACCELERATE.COMPILE_PAD: no C++ compiler found, so the backbone is not compiled")
    return False


def _pad_to(backbone: Backbone, multiple):
    """Pad images to a multiple of so many pixels, so that few shapes are compiled."""
    if multiple % max(1, backbone.size_divisibility):
        raise ValueError(
            f"SOLVER.ACCELERATE.COMPILE_PAD is {multiple}: use a multiple of {backbone.size_divisibility}, "
            "which the backbone needs"
        )
    # FPN keeps it in this attribute; the property has no setter.
    backbone._size_divisibility = multiple


def set_sgd_implementation(optimizer, name):
    """Choose how torch runs the updates of an SGD optimizer.

    Args:
        optimizer (torch.optim.SGD): a fresh one.
        name (str): "" as torch chooses, "foreach" (many tensors at once) or "fused" (one kernel).

    Raises:
        ValueError: for another name.
    """
    if name not in SGD:
        raise ValueError(f"SOLVER.ACCELERATE.SGD is {name!r}: use one of {', '.join(map(repr, SGD))}")
    for group in optimizer.param_groups if name else ():
        group["foreach"], group["fused"] = name == "foreach", name == "fused"
