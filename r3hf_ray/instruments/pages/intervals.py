"""Estimates with what is needed to doubt them: shares and means with 95% intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from r3hf_ray.algorithms.credit import binomial_interval, bootstrap_interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share or a mean with its 95% interval.

    Example: ``str(share(72.0, 100))`` is ``0.72 [0.63, 0.80]``
    """

    value: float
    low: float
    high: float
    count: int
    """Of cases, or of independent units that have a value."""

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]" if self.count else "–"


def share(wins: float, count: int) -> Estimate:
    """A proportion with Wilson's interval; (NaN, 0, 1) of nothing. A tie may count one half."""
    return Estimate(wins / count, *binomial_interval(wins, count), count) if count else Estimate(math.nan, 0.0, 1.0, 0)


def share_above_zero(margins: Sequence[float] | np.ndarray) -> Estimate:
    """How often a margin is positive; ties count one half."""
    margin = np.asarray(margins, dtype=np.float64)
    return share(float((margin > 0).sum() + 0.5 * (margin == 0).sum()), len(margin))


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean and bootstrap interval of one value for each independent unit; NaN values (no such unit) are left out."""
    known = np.array([value for value in values if not math.isnan(value)], dtype=np.float64)
    mean = float(known.mean()) if len(known) else math.nan
    return Estimate(mean, *bootstrap_interval(known, seed=0), len(known))
