"""Measurements with what is needed to doubt them: shares and means with 95% intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r3hf_ray.algorithms.credit import bootstrap_interval


@dataclass(frozen=True, slots=True)
class Share:
    """How often something holds.

    Example: ``str(wilson(72.0, 100))`` is ``0.72 [0.63, 0.80]``
    """

    value: float
    low: float
    high: float
    count: int
    """Of cases."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over independent responses or questions.

    Example: ``str(Mean(0.63, 0.60, 0.66, 388))`` is ``0.63 [0.60, 0.66]``
    """

    value: float
    low: float
    high: float
    count: int
    """Of units that have a value."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def wilson(wins: float, count: int) -> Share:
    """Score interval of a proportion (Wilson, 1927); (NaN, 0, 1) of nothing. A tie may count one half."""
    if count == 0:
        return Share(float("nan"), 0.0, 1.0, 0)
    z, p = 1.959964, wins / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Share(p, max(0.0, centre - half), min(1.0, centre + half), count)


def wins(margins: Sequence[float] | np.ndarray) -> Share:
    """How often a margin is positive; ties count one half."""
    margin = np.asarray(margins, dtype=np.float64)
    return wilson(float((margin > 0).sum() + 0.5 * (margin == 0).sum()), len(margin))


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and bootstrap interval of one value for each independent unit; NaN values (no such unit) are left out."""
    known = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    if len(known) == 0:
        return Mean(float("nan"), float("nan"), float("nan"), 0)
    low, high = bootstrap_interval(known, seed=0)
    return Mean(float(known.mean()), low, high, len(known))
