"""Credit methods to screen against sparse PPO with the reward model's critic; verdicts are in docs/results.md.

Each is a user's own method: name it in a job as ``reward.mode = "r3hf_ray.comparison.candidates:smoothed"``.
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

    ``r_t = S_t - S_{t-1}`` and the last token brings the sum to ``R - P_0``. Potential-based, since S_t knows the
    prefix only. The noise of single prefix scores shrinks, and credit comes later.
    """
    scores, mask = inputs.scores, inputs.response_mask
    average = scores.prompt
    smooth = torch.zeros_like(scores.prefix)
    for t in range(mask.shape[1]):
        average = torch.where(mask[:, t], KEPT * average + (1.0 - KEPT) * scores.prefix[:, t], average)
        smooth[:, t] = average
    return r3hf(replace(scores, prefix=smooth.masked_fill(~mask, 0.0)), mask)
