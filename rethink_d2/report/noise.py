"""Means over seeds, and how sure they are."""

import dataclasses
import math
import statistics

import numpy as np

__all__ = ["Difference", "Mean", "difference", "mean", "signed", "t_quantile"]

CONFIDENCE = 0.95
_STEPS = 20_001


@dataclasses.dataclass(frozen=True)
class Mean:
    """Of one number over seeds.

    Attributes:
        value: the mean.
        noise: standard deviation over the seeds; None of one seed.
        seeds: how many.
    """

    value: float
    noise: float | None
    seeds: int


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between the means of two arms.

    Attributes:
        value: first minus second.
        margin: half the width of its 95% interval; None if an arm has one seed only.
        seeds: of the two arms.
    """

    value: float
    margin: float | None
    seeds: tuple[int, int]

    def __str__(self):
        value = signed(self.value)
        if self.margin is None:
            return f"{value}, one seed: no interval"
        one, other = self.seeds
        seeds = f"{one}" if one == other else f"{one} and {other}"
        return f"{value} ± {self.margin:.1f}, {seeds} seeds"


def signed(value: float) -> str:
    """A difference as text, which is never -0.0."""
    return f"{round(value, 1) + 0.0:+.1f}"


def mean(values: list[float]) -> Mean | None:
    """Sum up the seeds; None where there is no value."""
    if not values:
        return None
    noise = statistics.stdev(values) if len(values) > 1 else None
    return Mean(statistics.fmean(values), noise, len(values))


def difference(first: list[float], second: list[float]) -> Difference | None:
    """Compare two arms, whose seeds are independent and whose noise may differ (Welch).

    Args:
        first, second: a value for each seed.

    Returns:
        None where an arm has no value.
    """
    one, other = mean(first), mean(second)
    if one is None or other is None:
        return None
    margin = None
    if one.noise is not None and other.noise is not None:
        parts = [(arm.noise**2 / arm.seeds, arm.seeds - 1) for arm in (one, other)]
        variance = sum(part for part, _ in parts)
        spread = sum(part**2 / freedom for part, freedom in parts)
        # At least 1 in theory; rounding must not make it less.
        freedom = max(1.0, variance**2 / spread) if spread else 1.0
        margin = t_quantile(freedom) * math.sqrt(variance)
    return Difference(one.value - other.value, margin, (one.seeds, other.seeds))


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """What Student's t stays below in absolute value, with this probability.

    With t = sqrt(freedom) tan(angle) its density is proportional to cos(angle) ** (freedom - 1), which is
    smooth and bounded, so that sums give it to five digits.

    Args:
        freedom: degrees of freedom, at least 1; need not be whole.
        confidence: between 0 and 1.
    """
    angles = np.linspace(0, np.pi / 2, _STEPS)
    density = np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return float(math.sqrt(freedom) * np.tan(np.interp(confidence * below[-1], below, angles)))
