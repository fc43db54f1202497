"""Credit methods to screen against sparse PPO with the reward model's critic; verdicts are in docs/results.md.

Each is a user's own method: name it in a job as ``reward.mode = "r3hf_ray.instruments.compare.candidates:smoothed"``.
All are potential-based: they pay the difference of a function of the prefix, and the last token brings the sum to ``R
- P_0`` of the model that is paid.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from r3hf_ray.algorithms.redistribution import RedistributionInputs, r3hf

KEPT = 0.5
"""Share of the old average that each token keeps in `smoothed`."""


def smoothed(inputs: RedistributionInputs) -> Float[Tensor, "B T"]:
    """R3HF of an exponential average of the prefix scores: ``S_t = KEPT S_{t-1} + (1 - KEPT) P_t``, ``S_0 = P_0``.

    The noise of single prefix scores shrinks, and credit comes later.
    """
    scores, mask = inputs.scores, inputs.response_mask
    average = scores.prompt
    smooth = torch.zeros_like(scores.prefix)
    for t in range(mask.shape[1]):
        average = torch.where(mask[:, t], KEPT * average + (1.0 - KEPT) * scores.prefix[:, t], average)
        smooth[:, t] = average
    return _paid(inputs, smooth - scores.prompt[:, None])


def agreed(inputs: RedistributionInputs) -> Float[Tensor, "B T"]:
    """The mean of all models' prefixes, less where they disagree: ``Phi_t = m_t^3 / (m_t^2 + v_t)``.

    m_t and v_t are mean and variance, over the models, of ``P_t - P_0``: what all agree on is kept, and where the
    variance is as large as the signal half of it is.
    """
    gained = torch.stack([scores.prefix - scores.prompt[:, None] for scores in inputs.by_model.values()])
    mean, variance = gained.mean(0), gained.var(0, correction=0)
    return _paid(inputs, mean**3 / (mean.square() + variance + 1e-12))


def _paid(inputs: RedistributionInputs, potential: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """R3HF with ``P_t := P_0 + potential_t``; the sum stays ``R - P_0``."""
    scores, mask = inputs.scores, inputs.response_mask
    prefix = (scores.prompt[:, None] + potential).masked_fill(~mask, 0.0)
    return r3hf(replace(scores, prefix=prefix), mask)
