"""How well token credit agrees with known credit: numpy in, plain floats out, one response or many.

Report the area under the curve by *phrase* beside the one by token: credit often lands a token early or late.
"""

import math

import numpy as np
from jaxtyping import Bool, Float, Integer


def auc(scores: Float[np.ndarray, "N"], labels: Bool[np.ndarray, "N"]) -> float:
    """Probability that a positive scores above a negative, ties counting one half; NaN if a class is empty.

    0.5 is chance. The Mann-Whitney statistic on mid-ranks, O(N log N).
    """
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(counts) - (counts - 1) / 2
    wins = mid_rank[group][labels].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))


def pearson(x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"]) -> float:
    """Pearson correlation in [-1, 1]; NaN if either side is constant or there are fewer than two values."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


def phrase_sums(values: Float[np.ndarray, "N"], phrase_ids: Integer[np.ndarray, "N"]) -> Float[np.ndarray, "phrases"]:
    """Sum of ``values`` over each phrase: ``out[k]`` belongs to phrase ``k`` of ``0..max(phrase_ids)``.

    A negative id is a token of no phrase and is left out; a phrase without tokens sums to 0.
    Example: values ``[.1, .2, .3, .4]``, ids ``[0, 0, -1, 1]`` -> ``[.3, .4]``.
    """
    inside = phrase_ids >= 0
    return np.bincount(phrase_ids[inside], weights=values[inside]).astype(np.float64)


def bootstrap_interval(
    values: Float[np.ndarray, "N"], *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one value for each independent unit.

    The unit is what was drawn independently, a question or a prompt: never a token. NaN values (a response without both
    classes has no area under the curve) are left out; with nothing left the interval is (NaN, NaN).

    Args:
        values: one statistic for each unit.
        seed: of the resampling.
        resamples: bootstrap samples.
        confidence: coverage, in (0, 1).
    """
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(known), size=(resamples, len(known)))
    low, high = np.quantile(known[draws].mean(axis=1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def binomial_interval(successes: float, trials: int) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion; a tie may count one half, which `scipy.stats.binomtest` does not take.

    Example: ``binomial_interval(60, 100)`` is about ``(0.502, 0.691)``
    """
    z, share = 1.959964, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)
