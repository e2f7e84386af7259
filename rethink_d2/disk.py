"""How much disk a run's checkpoints take."""

import math

from .solver.schedule import parse

__all__ = ["checkpoint_bytes", "checkpoints_kept"]


def checkpoint_bytes(model):
    """Size of one checkpoint: float32 parameters and buffers, and a momentum for each that trains.

    Args:
        model (nn.Module): on any device.
    """
    tensors = [*model.parameters(), *model.buffers(), *(p for p in model.parameters() if p.requires_grad)]
    return 4 * sum(t.numel() for t in tensors)


def checkpoints_kept(cfg):
    """How many checkpoints a finished run of a resolved config leaves."""
    solver = cfg.SOLVER
    start = 0
    if solver.CASCADE_FROM:
        start = parse(solver.CASCADE_FROM, solver.IMS_PER_BATCH, solver.ONE_X).max_iter
    count = 1
    if solver.CHECKPOINT_PERIOD > 0:
        count = math.ceil((solver.MAX_ITER - start) / solver.CHECKPOINT_PERIOD)
    if solver.CHECKPOINT_KEEP:
        count = min(count, solver.CHECKPOINT_KEEP)
    return count + len(solver.BRANCH_POINTS) + bool(solver.CHECKPOINT_BEST)
