"""Faster steps, each by one key of SOLVER.ACCELERATE; the paper's configs use none of them.

They change the order of floating-point sums, so a run with one is another run (its identity differs), but
what they compute is the same within float tolerance.
"""

import torch

__all__ = ["accelerate", "set_sgd_implementation"]

SGD = ("", "foreach", "fused")


def accelerate(model, options):
    """Apply CHANNELS_LAST to a model, in place.

    Args:
        model (nn.Module): not wrapped for several processes yet; names of its state stay as they are.
        options (CfgNode): SOLVER.ACCELERATE.

    Returns:
        nn.Module: the same model.
    """
    if options.CHANNELS_LAST:
        # Convolutions hand the format of their weights on to what follows.
        model.to(memory_format=torch.channels_last)
    return model


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
