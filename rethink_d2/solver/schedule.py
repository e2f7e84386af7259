"""Training lengths ("6x", "220k", "300") and the learning rate at an iteration.

"Rethinking ImageNet Pre-training", section 4: an "Nx schedule" is N x 90k iterations of 16 images, and
the rate drops for the last 60k and again for the last 20k iterations, whatever N is. Runs of one curve
therefore share their whole trajectory up to the first drop of the shorter one. That holds bit for bit
only if the rate is a function of the iteration alone, which :func:`multiplier` is: Detectron2's own
scheduler works on ``iteration / MAX_ITER``, whose warm-up differs in the last bits between lengths.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from math import floor
from typing import NamedTuple

import torch
from detectron2.solver import build_lr_scheduler as build_detectron2_lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

__all__ = [
    "ONE_X",
    "REFERENCE_BATCH",
    "IterationLR",
    "Schedule",
    "build_lr_scheduler",
    "multiplier",
    "parse",
]

REFERENCE_BATCH = 16
# Iterations of REFERENCE_BATCH images.
ONE_X = 90_000
# The last 60k and the last 20k iterations, in x.
TAILS = (Fraction(2, 3), Fraction(2, 9))
# The shortest length with full tails, in x: the shortest schedule of the paper's section 4.
FULL_TAILS_FROM = 2

_PATTERN = re.compile(r"(\d+(?:\.\d+)?)([xk]?)", re.ASCII)


class Schedule(NamedTuple):
    """Length of a run and where its rate drops, in iterations of the batch size it was made for.

    Attributes:
        max_iter: number of iterations.
        steps: ascending iterations from which on the rate is multiplied by another ``SOLVER.GAMMA``.
    """

    max_iter: int
    steps: tuple[int, ...]


def parse(schedule: str, ims_per_batch: int, one_x: int = ONE_X) -> Schedule:
    """Turn ``SOLVER.SCHEDULE`` into a length and rate drops.

    The drops are the last 60k and the last 20k iterations of 16 images, or as much of another ``one_x``.
    Runs shorter than 2x (the paper has none) keep the proportions of 2x: drops at 2/3 and 8/9 of the run.

    Args:
        schedule: "6x" or "2.5x" (times ``one_x`` iterations of 16 images, more of them with smaller
            batches), "220k" or "300" (literal iterations, whatever the batch).
        ims_per_batch: images per iteration over all processes (``SOLVER.IMS_PER_BATCH``).
        one_x: what 1x means, in iterations of 16 images (``SOLVER.ONE_X``); the paper's 90k.

    Returns:
        Schedule: fractions of an iteration are cut off, so a run is never longer than asked for.

    Raises:
        ValueError: if the text is malformed or not positive, or the run too short for two drops.
    """
    if ims_per_batch <= 0:
        raise ValueError(f"SOLVER.IMS_PER_BATCH: {ims_per_batch} is not positive")
    if one_x <= 0:
        raise ValueError(f"SOLVER.ONE_X: {one_x} is not positive; the paper's is {ONE_X}")
    match = _PATTERN.fullmatch(schedule)
    if match is None:
        raise ValueError(_message(schedule, "a training length"))
    # Exact arithmetic up to the end: floats would move drops by one iteration for some lengths.
    number, unit = Fraction(match[1]), match[2]
    x = Fraction(one_x * REFERENCE_BATCH, ims_per_batch)
    if unit == "x":
        length = number * x
    else:
        length = number * (1000 if unit == "k" else 1)
        if length.denominator != 1:
            raise ValueError(_message(schedule, "a whole number of iterations"))
    if length <= 0:
        raise ValueError(_message(schedule, "a positive length"))

    whole = min(x, length / FULL_TAILS_FROM)
    first, second = (floor(length - tail * whole) for tail in TAILS)
    # In runs of a few iterations both drops may fall on one; they stay two.
    first = min(first, second - 1)
    max_iter = floor(length)
    if not 0 < first < second < max_iter:
        raise ValueError(
            f"SOLVER.SCHEDULE: '{schedule}' is {max_iter} iteration(s) of {ims_per_batch} images, "
            "too short for two rate drops; at least 3 are needed"
        )
    return Schedule(max_iter, (first, second))


def _message(schedule, what):
    return f"SOLVER.SCHEDULE: '{schedule}' is not {what}; write '6x', '220k' or '300'"


def multiplier(
    iteration: int,
    *,
    steps: Sequence[int],
    gamma: float,
    warmup_iters: int,
    warmup_factor: float,
    warmup_method: str = "linear",
) -> float:
    """Return what the base rate is multiplied by at an iteration.

    The same rule as Detectron2's ``WarmupMultiStepLR``: a drop is in effect from ``iteration ==
    step``, warm-up goes from ``warmup_factor`` at 0 to 1 at ``warmup_iters``. It uses neither the
    length of the run nor drops that are still to come. Only where warm-up and drops or the end of
    the run overlap does Detectron2 differ: it bends the warm-up towards the later value.

    Args:
        iteration: from 0.
        steps: ascending iterations of the drops.
        gamma: factor of each drop.
        warmup_iters: length of the warm-up in iterations; 0 for none.
        warmup_factor: multiplier at iteration 0.
        warmup_method: "linear" or "constant" (``warmup_factor`` throughout the warm-up).

    Raises:
        ValueError: for another ``warmup_method``.
    """
    if warmup_method not in ("linear", "constant"):
        raise ValueError(f"SOLVER.WARMUP_METHOD: '{warmup_method}' is neither 'linear' nor 'constant'")
    value = gamma ** bisect_right(steps, iteration)
    if iteration >= warmup_iters:
        return value
    if warmup_method == "constant":
        return value * warmup_factor
    done = iteration / warmup_iters
    return value * (done + warmup_factor * (1 - done))


class IterationLR(LRScheduler):
    """Sets every parameter group's rate to its base rate times a function of the iteration.

    Used like Detectron2's ``LRMultiplier``: construct it with a fresh optimizer, call ``step()``
    after every iteration (``detectron2.engine.hooks.LRScheduler`` does).
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, multiplier: Callable[[int], float], last_iter: int = -1
    ):
        """Set the rates of iteration ``last_iter + 1``.

        Args:
            optimizer: its groups' ``lr`` are the base rates (``initial_lr`` if ``last_iter`` >= 0).
            multiplier: maps an iteration to a factor.
            last_iter: last finished iteration; -1 at the start of a run.
        """
        self._multiplier = multiplier
        super().__init__(optimizer, last_epoch=last_iter)

    def get_lr(self) -> list[float]:
        """Return each group's rate at the current iteration (``last_epoch`` in torch's words)."""
        factor = self._multiplier(self.last_epoch)
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict:
        """Return base rates and iteration, plain values only; the function is the config's."""
        return {"base_lrs": [float(x) for x in self.base_lrs], "last_epoch": int(self.last_epoch)}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continue at a saved iteration; also sets the optimizer's rates.

        Raises:
            ValueError: if the optimizer has another number of parameter groups.
        """
        groups = self.optimizer.param_groups
        if len(state_dict["base_lrs"]) != len(groups):
            raise ValueError(
                f"the scheduler's state has {len(state_dict['base_lrs'])} parameter groups, "
                f"the optimizer {len(groups)}"
            )
        self.base_lrs = list(state_dict["base_lrs"])
        self.last_epoch = state_dict["last_epoch"]
        # Not left to the optimizer's own state, which may be loaded before, after or not at all.
        self._last_lr = self.get_lr()
        for group, base_lr, lr in zip(groups, self.base_lrs, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base_lr, lr


def build_lr_scheduler(cfg, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Build the scheduler of a run, in place of Detectron2's function of the same name.

    Args:
        cfg (CfgNode): a Detectron2 config. ``SOLVER.SCHEDULE``, where it exists and is not empty, wins
            over ``SOLVER.STEPS``.
        optimizer: a fresh optimizer.

    Returns:
        LRScheduler: an :class:`IterationLR` for ``WarmupMultiStepLR``; for other values of
        ``SOLVER.LR_SCHEDULER_NAME``, and with ``RESCALE_INTERVAL``, which stretch over the length of the
        run, Detectron2's own scheduler.

    Raises:
        ValueError: if the steps are not ascending, or ``SOLVER.SCHEDULE`` or ``WARMUP_METHOD`` is wrong.
    """
    solver = cfg.SOLVER
    schedule = solver.get("SCHEDULE", "")
    if not schedule and (solver.LR_SCHEDULER_NAME != "WarmupMultiStepLR" or solver.RESCALE_INTERVAL):
        return build_detectron2_lr_scheduler(cfg, optimizer)
    steps = tuple(solver.STEPS)
    if schedule:
        steps = parse(schedule, solver.IMS_PER_BATCH, solver.get("ONE_X", ONE_X)).steps
    if any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"SOLVER.STEPS: {steps} is not ascending")
    return IterationLR(
        optimizer,
        partial(
            multiplier,
            steps=steps,
            gamma=solver.GAMMA,
            warmup_iters=solver.WARMUP_ITERS,
            warmup_factor=solver.WARMUP_FACTOR,
            warmup_method=solver.WARMUP_METHOD,
        ),
    )
