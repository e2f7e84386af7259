"""Faster steps, each by one key of SOLVER.ACCELERATE; the paper's configs use none of them.

They change the order of floating-point sums, so a run with one is another run (its identity differs), but
what they compute is the same within float tolerance. COMPILE alone changes a little more: it pads images.
"""

import os
import shutil

import torch
import torch.nn.functional as F

from ..modeling.pooler import replace_poolers

__all__ = ["accelerate", "compile_backbone", "set_sgd_implementation"]

SGD = ("", "foreach", "fused")

# Sides of compiled batches, in pixels: at the paper's scale (800, at most 1333) about twelve shapes occur.
PADDED_TO = 128
# With scale augmentation; torch's own limit of 8 would leave further shapes as they are.
_MOST_SHAPES = 64


def accelerate(model, options):
    """Apply CHANNELS_LAST, ROI_ALIGN and COMPILE to a model, in place.

    Args:
        model (nn.Module): not wrapped for several processes yet; names of its state stay as they are.
        options (CfgNode): SOLVER.ACCELERATE.

    Returns:
        nn.Module: the same model.

    Raises:
        ValueError: there is no pooler to replace, nothing to compile, or nothing to compile with.
    """
    if options.CHANNELS_LAST:
        # Convolutions hand the format of their weights on to what follows.
        model.to(memory_format=torch.channels_last)
    if options.ROI_ALIGN and not replace_poolers(model):
        raise ValueError(
            f"SOLVER.ACCELERATE.ROI_ALIGN: {type(model).__name__} has no ROIAlign pooler with a positive "
            "POOLER_SAMPLING_RATIO, and others are not made faster; set it to False"
        )
    if options.COMPILE:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ValueError(
                f"SOLVER.ACCELERATE.COMPILE needs a C++ compiler, but there is no {compiler}: install g++, "
                "name another in the variable CXX, or set the key to False"
            )
        compile_backbone(model)
    return model


def compile_backbone(model, backend="inductor"):
    """Let torch compile the backbone with its FPN for training, in place.

    Each shape is compiled when it first occurs, which takes a minute or so. So that they are few, batches are
    padded further, with zeros to multiples of :data:`PADDED_TO`. Where statistics span the whole image, as in
    group norm, that is a small change. Evaluation runs as without.

    Args:
        model (nn.Module): with an attribute ``backbone`` that takes images (N, C, H, W).
        backend (str): torch's.

    Raises:
        ValueError: it has none.
    """
    if not hasattr(model, "backbone"):
        raise ValueError(
            f"SOLVER.ACCELERATE.COMPILE: {type(model).__name__} has no backbone to compile; set it to False"
        )
    backbone, plain = model.backbone, model.backbone.forward
    compiled = torch.compile(plain, dynamic=False, backend=backend, recompile_limit=_MOST_SHAPES)

    def forward(images):
        if not backbone.training:
            return plain(images)
        height, width = images.shape[-2:]
        return compiled(F.pad(images, (0, -width % PADDED_TO, 0, -height % PADDED_TO)))

    backbone.forward = forward


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
    if name == "fused":
        optimizer.register_step_pre_hook(_complete_momentum)


def _complete_momentum(optimizer, *_):
    """Give the fused kernel what it takes for granted: momentum of all parameters, in memory as they are.

    Without this it refuses a parameter that gets its first gradient later than others, such as a new one in a
    model that goes on, and it scrambles momentum of another memory format.
    """
    momentum = "momentum_buffer"
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if p.grad is None:
                continue
            state = optimizer.state[p]
            if state.get(momentum) is None:
                state[momentum] = torch.zeros_like(p)  # no history, as dampening is 0
            elif state[momentum].stride() != p.stride():
                state[momentum] = torch.empty_like(p).copy_(state[momentum])
