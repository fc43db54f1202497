"""Numbers of a comparison, from curves of single runs. Pure functions; a curve is two lists of equal length."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean, stdev
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Samples of one arm over those of another, same seed.

    Example: 384 against 512 is ``Ratio(seed=0, value=0.75)``; never, in 1920, against 512 is ``> 3.75``.
    """

    seed: int
    value: float
    bound: Literal["", ">", "<"] = ""
    """`>`: the ratio is above `value`, since the arm never got there or the other one was there at once; `<`: below,
    since the other one never did or the arm was there at once."""

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.2f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One arm minus another, seed by seed.

    Example: ``paired_difference({0: 4.0, 1: 5.0}, {0: 3.0, 1: 3.0})`` is
    ``Difference(mean=1.5, sem=0.5, above=2, seeds=2)``
    """

    mean: float
    sem: float
    """Standard error of the mean over seeds; NaN with one seed."""
    above: int
    """Seeds with which the arm is higher."""
    seeds: int

    def __str__(self) -> str:
        error = f" ± {self.sem:.2f}" if math.isfinite(self.sem) else ""
        return f"{self.mean:+.2f}{error} ({self.above} of {self.seeds})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """When a run reached the threshold.

    Example: ``Reach(at=352, of=1920)``; a finished run that never did: ``Reach(at=None, of=1920)``.
    """

    at: int | None
    """Samples up to and with the step whose trailing mean was there."""
    of: int
    """Samples of the whole run."""
    at_once: bool = False
    """There in the first window already, so that `at` says how long the window is and nothing of the speed."""


def mean(values: Iterable[float]) -> float:
    """Mean of what is finite; NaN of nothing."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def spread(values: Iterable[float]) -> float:
    """Sample standard deviation of what is finite; NaN of fewer than two."""
    finite = [value for value in values if math.isfinite(value)]
    return stdev(finite) if len(finite) > 1 else math.nan


def trailing_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of each value and the ``window - 1`` before it; nothing for the first ``window - 1``.

    Example: ``trailing_mean([1, 2, 3, 4], 3) == [2, 3]``
    """
    return [fmean(values[end - window : end]) for end in range(window, len(values) + 1)]


def samples_to(threshold: float, samples: Sequence[int], golds: Sequence[float], *, window: int) -> int | None:
    """Samples up to the first step whose trailing mean of gold is at the threshold; None: never."""
    means = trailing_mean(golds, window)
    return next((at for at, level in zip(samples[window - 1 :], means, strict=True) if level >= threshold), None)


def shared_points(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> dict[float, list[float]]:
    """Each x that all curves have -> their values there.

    Example: ``shared_points([([1, 2], [0, 1]), ([1, 2, 3], [2, 3, 9])]) == {1: [0, 2], 2: [1, 3]}``
    """
    known = [dict(zip(x, y, strict=True)) for x, y in curves]
    shared = sorted(set.intersection(*map(set, known))) if known else []
    return {x: [curve[x] for curve in known] for x in shared}


def by_cell(x: Sequence[float], y: Sequence[float], *, width: float) -> tuple[list[float], list[float]]:
    """Mean y in cells of x, at the cells' middles; a cell without a point is left out.

    It makes curves over KL, which does not grow evenly, comparable between runs.

    Example: ``by_cell([0.1, 0.3, 2.5], [1, 3, 6], width=1) == ([0.5, 2.5], [2, 6])``
    """
    cells: dict[float, list[float]] = {}
    for position, value in zip(x, y, strict=True):
        cells.setdefault((math.floor(position / width) + 0.5) * width, []).append(value)
    return sorted(cells), [fmean(cells[middle]) for middle in sorted(cells)]


def mean_near(x: Sequence[float], y: Sequence[float], *, at: float, within: float) -> float:
    """Mean y of the points whose x is within a share of ``at``; NaN without any.

    Example: ``mean_near([1, 5, 6], [0, 2, 4], at=5.5, within=0.2) == 3``
    """
    return mean(value for position, value in zip(x, y, strict=True) if abs(position - at) <= within * at)


def paired_difference(arm: Mapping[int, float], against: Mapping[int, float]) -> Difference | None:
    """Over the seeds for which both have a number; None without any."""
    both = [arm[seed] - against[seed] for seed in sorted(set(arm) & set(against))]
    known = [value for value in both if math.isfinite(value)]
    if not known:
        return None
    above = sum(value > 0.0 for value in known)
    return Difference(mean=fmean(known), sem=spread(known) / math.sqrt(len(known)), above=above, seeds=len(known))


def paired_ratios(arm: Mapping[int, Reach], against: Mapping[int, Reach]) -> list[Ratio]:
    """Ratio of samples to the threshold for each seed that both have; a seed that tells nothing has none."""
    pairs = ((seed, arm[seed], against[seed]) for seed in sorted(set(arm) & set(against)))
    return [ratio for seed, own, other in pairs if (ratio := _ratio(seed, own, other))]


def _ratio(seed: int, own: Reach, other: Reach) -> Ratio | None:
    value = (own.at or own.of) / (other.at or other.of)
    above, below = own.at is None or other.at_once, other.at is None or own.at_once
    if above and below:  # neither ever got there, or both at once
        return None
    return Ratio(seed=seed, value=value, bound=">" if above else "<" if below else "")


def mean_ratio(ratios: Sequence[Ratio]) -> float:
    """Geometric mean, so that it does not matter which arm is named first; NaN without any, or with bounds both ways.

    Example: 2 and 0.5 have the mean 1.
    """
    if not ratios or {ratio.bound for ratio in ratios} >= {"<", ">"}:
        return math.nan
    return geometric_mean(ratio.value for ratio in ratios)
